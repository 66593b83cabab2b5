"""Activations under the mean mask against masks in full with autograd."""

import pytest
import torch
from torch import Tensor

from dmoe.ops import mean_mask
from dmoe.ops.mean_mask import MaskRule, masked_activation, masked_activation_loop
from dmoe.ops.top_mask import top_bits

TOKENS, SAMPLES, LATENT, NEURONS = 7, 3, 5, 16


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def choose(k: int, tokens: slice, logits_CF: Tensor) -> Tensor:
    return top_bits(logits_CF, 4)


def inputs(tokens: int = TOKENS, activation: str = "gelu") -> tuple[Tensor, Tensor, Tensor]:
    width = 2 * NEURONS if activation == "swiglu" else NEURONS
    return draw(tokens, width), draw(tokens, SAMPLES, LATENT), draw(NEURONS, LATENT)


@pytest.mark.parametrize("pieces", ["whole", "of_three_tokens"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, 0])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_equals_the_mean_of_masks(activation, tokens, hard, pieces, monkeypatch) -> None:
    if pieces == "of_three_tokens":
        monkeypatch.setattr(mean_mask, "_PIECE_ELEMENTS", 3 * NEURONS)
    leaves = inputs(tokens, activation)
    how = {"choose": choose, "rule": MaskRule(hard, 1.7), "activation": activation}
    results = []
    for compute in (masked_activation, masked_activation_loop):
        a_TF = compute(*leaves, **how)
        da_TF = torch.linspace(-1, 1, a_TF.numel(), dtype=torch.float64).view_as(a_TF)
        results.append((a_TF, *torch.autograd.grad(a_TF, leaves, da_TF)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert not tokens or want.any()


def test_a_hard_mask_counts_samples() -> None:
    hidden_TH, z_TKZ, w_FZ = inputs()
    rule = MaskRule(hard=True, scale=SAMPLES)
    ones_TF = torch.ones_like(hidden_TH)
    a_TF = masked_activation(ones_TF, z_TKZ, w_FZ, choose=choose, rule=rule, activation="relu")
    assert set(a_TF.round(decimals=9).flatten().tolist()) == {0, 1, 2, 3}
    assert a_TF.sum().item() == pytest.approx(TOKENS * SAMPLES * 4)


def test_beside_the_inputs_one_bit_a_neuron_and_sample_is_kept() -> None:
    leaves = inputs(activation="swiglu")
    kept: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        masked_activation(*leaves, choose=choose, rule=MaskRule(False, 1.0), activation="swiglu")
    known = {leaf.data_ptr() for leaf in leaves}
    bits = [tensor for tensor in kept if tensor.data_ptr() not in known]
    assert {tensor.dtype for tensor in bits} == {torch.uint8}
    assert sum(tensor.nbytes for tensor in bits) * 8 == TOKENS * SAMPLES * NEURONS


def test_narrow_activations_under_a_wide_mask() -> None:
    hidden_TH, z_TKZ, w_FZ = (leaf.detach() for leaf in inputs(activation="swiglu"))
    leaves = [t.requires_grad_() for t in (hidden_TH.bfloat16(), z_TKZ.float(), w_FZ.float())]
    a_TF = masked_activation(*leaves, choose=choose, rule=MaskRule(False, 1.0), activation="swiglu")
    assert a_TF.dtype == torch.bfloat16
    a_TF.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
