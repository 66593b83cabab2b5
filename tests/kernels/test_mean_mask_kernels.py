"""Infinity-MoE's kernels against their torch twins: masks exactly, the rest closely."""

import pytest
import torch
from on_device import DEVICE, assert_close, twice  # first: it skips this file

from dmoe.moe import MoEConfig, MoEContext
from dmoe.ops.mean_mask import MaskRule, masked_activation_loop
from dmoe.ops.top_mask import pack_bits, top_mask_sorted
from dmoe.ops.triton_masks import masked_activation_by_triton

kernels = pytest.importorskip("dmoe_kernels.chosen_masks")
scores = pytest.importorskip("dmoe_kernels.latent_scores")

# In float32 that of three products of TF32, on a GPU.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def exact_scores(tokens: int, samples: int, latent: int, width: int, spread: int):
    """Return z and W_z of small integers, whose products are exact, and often equal."""
    generator = torch.Generator().manual_seed(width)
    z = torch.randint(-spread, spread + 1, (tokens, samples, latent), generator=generator)
    w = torch.randint(-spread, spread + 1, (width, latent), generator=generator)
    return z.float(), w.float()


@pytest.mark.parametrize("spread", [1, 1000])
@pytest.mark.parametrize(("width", "n"), [(8, 1), (48, 12), (64, 64), (72, 71), (1000, 250)])
def test_masks_are_those_of_a_stable_sort(width: int, n: int, spread: int) -> None:
    z, w = exact_scores(2, 2, 3, width, spread)
    got = kernels.latent_masks(z.to(DEVICE), w.to(DEVICE), n)
    for k in range(2):
        want = pack_bits(top_mask_sorted(z[:, k] @ w.t(), n))
        assert torch.equal(got[:, k].cpu(), want)


@pytest.mark.parametrize(("width", "n"), [(136, 40), (520, 33), (1000, 999)])
def test_masks_are_exact_on_the_scores_of_the_kernels(width: int, n: int) -> None:
    """Scores are rounded otherwise than torch's, so that masks may differ at the threshold."""
    torch.manual_seed(width)
    z, w = torch.randn(9, 2, 20, device=DEVICE), torch.randn(width, 20, device=DEVICE)
    got = scores.latent_scores(z, w)
    assert_close(got, z.double() @ w.double().t(), TOLERANCE[torch.float32])
    want = pack_bits(top_mask_sorted(got.cpu().flatten(0, 1), n))
    assert torch.equal(kernels.latent_masks(z, w, n).cpu().flatten(0, 1), want)


@pytest.mark.parametrize("value", [0.0, -0.0, 7.0, torch.inf])
def test_all_scores_equal(value: float) -> None:
    z, w = torch.full((1, 1, 1), value), torch.ones(64, 1)
    w[::2] *= -1 if value == 0 else 1  # 0.0 and -0.0 are equal, too
    bits = kernels.latent_masks(z.to(DEVICE), w.to(DEVICE), 20)
    want = pack_bits(torch.arange(64)[None] < 20)
    assert torch.equal(bits[0].cpu(), want)


def test_few_passes_find_the_threshold() -> None:
    """A search bit by bit counts the scores 32 times."""
    generator = torch.Generator().manual_seed(0)
    for width, n in ((3072, 768), (3072, 96)):
        z = torch.randn(3, 2, 8, generator=generator).to(DEVICE)
        w = torch.randn(width, 8, generator=generator).to(DEVICE)
        passes = torch.empty(3, 2, dtype=torch.int32, device=DEVICE)
        kernels.latent_masks(z, w, n, passes)
        assert passes.float().mean() <= 8
        assert passes.max() <= 16


def test_no_tokens() -> None:
    empty = torch.zeros(0, 2, 3, device=DEVICE)
    assert kernels.latent_masks(empty, torch.ones(16, 3, device=DEVICE), 4).shape == (0, 2, 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("chosen_before", [False, True])
def test_activation_equals_the_twin(
    activation: str, hard: bool, dtype: torch.dtype, chosen_before: bool
) -> None:
    """The twin gets the masks of the kernel."""
    tokens, samples, latent, width, n = 5, 2, 4, 136, 40
    torch.manual_seed(0)
    z, w = torch.randn(tokens, samples, latent), torch.randn(width, latent)
    hidden = torch.randn(tokens, width * (2 if activation == "swiglu" else 1)).to(dtype)
    da = torch.randn(tokens, width).to(dtype)
    valid = torch.tensor([True, True, False, True, True])
    bits = kernels.latent_masks(z.to(DEVICE), w.to(DEVICE), n)
    bits *= valid.to(DEVICE)[:, None, None]

    got = [t.clone().to(DEVICE).requires_grad_() for t in (hidden, z, w)]
    how = {"rule": MaskRule(hard, 1.5), "activation": activation}
    a, got_bits = masked_activation_by_triton(
        *got,
        n,
        decide=lambda select: bits if chosen_before else select(),
        valid_T=valid.to(DEVICE),
        **how,
    )
    assert torch.equal(got_bits, bits)
    got_all = [a, *torch.autograd.grad(a, got, da.to(DEVICE))]

    want = [t.double().requires_grad_() for t in (hidden, z, w)]
    a = masked_activation_loop(*want, choose=lambda k, *_: bits[:, k].cpu(), **how)
    want_all = [a, *torch.autograd.grad(a, want, da.double())]
    for x, y in zip(got_all, want_all, strict=True):
        assert_close(x, y, TOLERANCE[dtype])


def test_tokens_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(66, 32), torch.randn(66, 1, 3), torch.randn(32, 3)]
    whole = forward_and_backward(*leaves)
    monkeypatch.setattr(scores, "SCRATCH_BYTES", 64 * 32 * 4)
    pieces = forward_and_backward(*leaves)
    exact = len(whole) - 2  # a product of torch makes the last two, of a piece at a time
    assert all(torch.equal(x, y) for x, y in zip(pieces[:exact], whole[:exact], strict=True))
    for got, want in zip(pieces[exact:], whole[exact:], strict=True):
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("valid", [None, torch.arange(6) % 3 < 2])
def test_a_layer_of_neurons_equals_torch(valid: torch.Tensor | None) -> None:
    results = []
    for backend in ("triton", "auto"):
        torch.manual_seed(0)
        options = {"granularity": "neuron", "ffn_dim": 64, "samples": 2}
        config = MoEConfig.model_validate({"infinite": options, "backend": backend})
        layer = config.build(dim=8, activation="swiglu").to(DEVICE)
        x = torch.randn(6, 8).to(DEVICE).requires_grad_()
        ids = torch.arange(6, device=DEVICE)
        moved = None if valid is None else valid.to(DEVICE)
        y, output = layer(x, MoEContext(3, token_ids_T=ids, valid_T=moved))
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        results.append([y, output.stats.counts_E, *gradients])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-5)


def test_twice_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, 32), torch.randn(3, 2, 3), torch.randn(32, 3)]
    twice(lambda: forward_and_backward(*leaves))


def forward_and_backward(
    hidden: torch.Tensor, z: torch.Tensor, w: torch.Tensor
) -> list[torch.Tensor]:
    """Return masks, output and gradients."""
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in (hidden, z, w)]
    how = {"rule": MaskRule(False, 1.0), "activation": "gelu"}
    a, bits = masked_activation_by_triton(*leaves, 8, decide=lambda select: select(), **how)
    return [bits, a, *torch.autograd.grad(a.sum(), leaves)]
