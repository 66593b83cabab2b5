"""The collapsed layer against a masked network for each sample; float64, every gradient."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from small_space import TOKENS, VALID_T, WIDTH, build, context, gradients, tokens
from torch.utils.checkpoint import checkpoint

from dmoe.moe import MoEConfig
from dmoe.moe.infinite import space as space_of_experts
from dmoe.moe.infinite.latent import Noise
from dmoe.rng import stream_key, token_normal

ROUTERS = [
    {"name": "gaussian"},
    {"name": "gaussian", "hidden_dim": 8, "log_variance_min": -0.5, "log_variance_max": 0.5},
    {"name": "mixture", "components": 3},
]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mask", ["soft", "hard"])
@pytest.mark.parametrize("mask_position", ["after_activation", "pre_activation"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_equals_a_network_for_each_sample(activation, mask_position, mask, router) -> None:
    layer = build(activation, mask=mask, mask_position=mask_position, router=router)
    x_TD = tokens()
    y_TD, _ = layer(x_TD, context())
    y_loop = layer.forward_loop(x_TD, context())
    leaves = [x_TD, *layer.parameters()]
    torch.testing.assert_close(y_TD, y_loop, rtol=1e-12, atol=1e-12)
    # With a hard mask before the activation the straight-through gradient is that of one after it.
    if (mask, mask_position) == ("hard", "pre_activation"):
        layer = build(activation, mask="hard", router=router)
        y_after, _ = layer(x_TD, context())
        assert torch.equal(y_TD, y_after)
        return
    results = zip(gradients(y_TD, leaves), gradients(y_loop, leaves), strict=True)
    for got, want in results:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert got.any(), "every parameter learns"


def test_is_the_equations_of_the_paper() -> None:
    """Written out from the paper, one token and sample at a time."""
    layer = build("gelu", active_fraction=0.25, samples=2)
    x_TD = tokens().detach()
    y_TD, _ = layer(x_TD, context())
    mean, log_variance = layer.router.mean, layer.router.log_variance
    up, down = layer.neurons.up_proj.weight, layer.neurons.down_proj.weight
    for t in (0, 7):
        y = torch.zeros_like(x_TD[t])
        for k in range(2):
            key = stream_key(0, "infinite", 0, 0, 0, k)
            eps = token_normal(key, torch.tensor([t]), 4)[0].double()
            variance = (log_variance.weight @ x_TD[t] + log_variance.bias).clamp(-8, 4).exp()
            z = mean.weight @ x_TD[t] + mean.bias + variance.sqrt() * eps
            scores = layer.space.w_z_FZ @ z
            m = torch.zeros(WIDTH, dtype=torch.float64)
            best = sorted(range(WIDTH), key=lambda f: -scores[f].item())[: WIDTH // 4]
            m[best] = scores[best]
            y += down @ (m * F.gelu(up @ x_TD[t], approximate="tanh")) / 2
        torch.testing.assert_close(y_TD[t], layer.space.gain * y, rtol=1e-12, atol=1e-12)


def test_padding_gets_nothing_and_weighs_nothing() -> None:
    layer, x_TD = build(), tokens()
    y_TD, output = layer(x_TD, context())
    assert not y_TD[~VALID_T].any()
    assert output.stats.counts_E.sum() == 10 * 3 * WIDTH // 4
    y_TD.sum().backward()
    assert not x_TD.grad[~VALID_T].any()


def test_no_tokens() -> None:
    layer = build()
    x_TD = tokens()[:0]
    y_TD, output = layer(x_TD, context(valid_T=None, token_ids_T=torch.arange(0)))
    y_TD.sum().backward()
    assert y_TD.shape == x_TD.shape
    assert not output.stats.counts_E.any()


def test_noise_follows_the_token() -> None:
    layer, x_TD = build(), tokens()
    whole, _ = layer(x_TD, context(valid_T=None))
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    shuffled, _ = layer(x_TD[order], context(valid_T=None, token_ids_T=order))
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-12, atol=1e-12)
    for other in ({"step": 1}, {"layer": 1}, {"seed": 1}):
        changed, _ = layer(x_TD, context(valid_T=None, **other))
        assert not torch.isclose(changed, whole).all()


@pytest.mark.parametrize("options", [{}, {"mask_position": "pre_activation"}, {"deep": {}}])
def test_recompute_gives_the_same_gradients_and_never_chooses_again(options, monkeypatch) -> None:
    layer = build(**options)
    calls: list[int] = []
    choose = space_of_experts.top_bits

    def choose_otherwise_when_asked_again(scores_TF: torch.Tensor, n: int) -> torch.Tensor:
        calls.append(n)
        return choose(scores_TF if len(calls) <= first else -scores_TF, n)

    monkeypatch.setattr(space_of_experts, "top_bits", choose_otherwise_when_asked_again)
    first, results = 99, []
    for again in (False, True):
        calls.clear()
        x_TD, place = tokens(), context()
        if again:
            y_TD, _ = checkpoint(layer, x_TD, place, use_reentrant=False)
        else:
            y_TD, _ = layer(x_TD, place)
        first = len(calls)
        results.append(gradients(y_TD, [x_TD, *layer.parameters()]))
        assert len(calls) == first
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_samples_at_inference() -> None:
    layer, x_TD = build(inference_samples=5), tokens()
    counts = {
        name: layer(x_TD, place)[1].stats.counts_E.sum().item() // (10 * WIDTH // 4)
        for name, place in {
            "training": context(),
            "inference": context(training=False),
            "asked": context(training=False, samples=8),
            "mean": context(training=False, samples="mean"),
        }.items()
    }
    assert counts == {"training": 3, "inference": 5, "asked": 8, "mean": 1}
    # The first samples of eight are those of three.
    few, many = (layer.router(x_TD, space_noise(n), n).z_TKZ[:, :3] for n in (3, 8))
    assert torch.equal(few, many)


def space_noise(samples: int) -> Noise:
    return Noise(context(training=False, samples=samples))


def test_mean_at_inference() -> None:
    layer, x_TD = build(inference="mean"), tokens()
    y_TD, output = layer(x_TD, context(training=False, token_ids_T=None))
    assert output.stats.counts_E.sum() == 10 * WIDTH // 4
    assert "overlap" not in output.stats.sums
    mean_TZ = layer.router.mean(x_TD)
    z = layer.router(x_TD, space_noise(1), 0).z_TKZ[:, 0]
    assert torch.equal(z, mean_TZ)
    # A model that takes the mean draws samples where it is asked to, and the other way round.
    sampling = build()
    for of, place in ((layer, context), (sampling, context)):
        assert torch.equal(of(x_TD, place(training=False, samples="mean"))[0], y_TD)
        assert not torch.isclose(of(x_TD, place(training=False, samples=3))[0], y_TD)[:10].any()


@pytest.mark.parametrize("rule", ["argmax", "average"])
def test_the_mean_of_a_mixture_follows_the_rule(rule) -> None:
    router = {"name": "mixture", "components": 3, "mean": rule}
    layer, x_TD = build(router=router, inference="mean"), tokens().detach()
    z_TZ = layer.router(x_TD, space_noise(1), 0).z_TKZ[:, 0]
    means_TMZ = layer.router.mean(x_TD).view(TOKENS, 3, 4)
    p_TM = layer.router.choice(x_TD).softmax(-1)
    for t in range(TOKENS):
        if rule == "argmax":
            expected = means_TMZ[t, p_TM[t].argmax()]
        else:
            expected = sum(p * m for p, m in zip(p_TM[t], means_TMZ[t], strict=True))
        torch.testing.assert_close(z_TZ[t], expected)


def test_a_mixture_chooses_components_as_often_as_it_says() -> None:
    layer = build(router={"name": "mixture", "components": 3}, samples=1)
    for name, parameter in layer.router.named_parameters():
        parameter.data.zero_()
        if name == "mean.bias":  # component m is at the point (m, m, m, m), with no noise
            parameter.data.copy_(torch.arange(3.0).repeat_interleave(4))
        if name == "log_variance.bias":
            parameter.data.fill_(-100.0)
    p = torch.tensor([0.5, 0.3, 0.2])
    layer.router.choice.bias.data.copy_(p.log())
    x_TD = torch.zeros(4000, 16, dtype=torch.float64)
    place = context(valid_T=None, token_ids_T=torch.arange(4000))
    z_TZ = layer.router(x_TD, Noise(place), 1).z_TKZ[:, 0]
    shares = torch.bincount(z_TZ[:, 0].round().long(), minlength=3) / 4000
    torch.testing.assert_close(shares, p, atol=0.03, rtol=0)


def test_statistics_by_hand() -> None:
    layer, x_TD = build(samples=2), tokens()
    place = context()
    _, output = layer(x_TD, place)
    latents = layer.router(x_TD, Noise(place), 2)
    sets = [
        [
            set((layer.space.w_z_FZ @ z).argsort(descending=True)[: WIDTH // 4].tolist())
            for z in latents.z_TKZ[t]
        ]
        for t in range(10)
    ]
    sums = output.stats.sums
    assert sums["overlap"].item() == pytest.approx(sum(len(a & b) / 8 for a, b in sets))
    assert sums["active"].item() == pytest.approx(sum(len(a | b) / WIDTH for a, b in sets))
    for j, count in enumerate(output.stats.counts_E.tolist()):
        assert count == sum((j in a) + (j in b) for a, b in sets)
    sigma = (0.5 * layer.router.log_variance(x_TD).clamp(-8, 4)).exp()[:10]
    assert sums["sigma"].item() == pytest.approx(sigma.mean(1).sum().item())
    assert sums["sigma_square"].item() == pytest.approx(sigma.square().mean(1).sum().item())


def test_bfloat16_tokens_meet_float32_weights() -> None:
    layer, wide = build().float(), build().float()
    x_TD = tokens().detach().bfloat16().requires_grad_()
    y_TD, _ = layer(x_TD, context())
    assert y_TD.dtype == torch.bfloat16
    y_TD.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    reference, _ = wide(x_TD.float(), context())
    assert (y_TD - reference).norm() < 0.02 * reference.norm()


CASES = list(product(("swiglu", "gelu"), ("soft", "hard"), (0.05, 0.25, 0.5), (1, 2, 4), [{}]))
OPTIONS = [{"mask_position": "pre_activation"}, {"router": {"name": "mixture", "components": 3}}]
CASES += product(("swiglu", "gelu"), ["soft"], [0.25], (1, 2), OPTIONS)


@pytest.mark.parametrize(("activation", "mask", "fraction", "samples", "options"), CASES)
def test_the_output_starts_at_the_scale_of_the_network_without_masks(
    activation, mask, fraction, samples, options
) -> None:
    infinite = {"ffn_dim": 512, "mask": mask, "active_fraction": fraction, "samples": samples}
    infinite |= options
    torch.manual_seed(0)
    layer = MoEConfig.model_validate({"infinite": infinite}).build(dim=64, activation=activation)
    for parameter in layer.neurons.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_TD = torch.randn(400, 64)
    with torch.no_grad():
        y_TD, _ = layer(x_TD, context(valid_T=None, token_ids_T=torch.arange(400)))
        ratio = (y_TD.std() / layer.neurons(x_TD).std()).item()
    assert math.isclose(ratio, 1, rel_tol=0.1), ratio
