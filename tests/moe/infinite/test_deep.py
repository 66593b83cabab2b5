"""Several masked layers: against one sample at a time, and where each layer's z comes from."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_space import VALID_T, WIDTH, build, context, gradients, tokens

from dmoe.moe import MoEConfig
from dmoe.ops.activation import activate

LATENTS = ["shared", "independent", "hierarchical"]


def by_sample(layer, x_TD: torch.Tensor, place) -> torch.Tensor:
    """The layer with autograd and whole masks, a sample at a time."""
    latents = layer.router(x_TD, place)
    outputs = []
    for k in range(latents[0].z_TKZ.shape[1]):
        a_TF = hidden_TH = layer.neurons.up_proj(x_TD)
        for index, (space, latent) in enumerate(zip(layer.spaces, latents, strict=True)):
            if index:
                scale_T1 = a_TF.square().mean(1, keepdim=True)
                normed_TF = a_TF * (scale_T1 + torch.finfo(a_TF.dtype).eps).rsqrt()
                hidden_TH = layer.deeper_neurons[index - 1](normed_TF)
            scores_TF = latent.z_TKZ[:, k] @ space.w_z_FZ.t()
            least_T1 = scores_TF.sort(descending=True).values[:, space.num_active - 1, None]
            mask_TF = scores_TF * (scores_TF >= least_T1) * VALID_T[:, None] * space.gain
            a_TF = activate(hidden_TH, layer.activation) * mask_TF
        outputs.append(a_TF)
    return layer.neurons.down_proj(torch.stack(outputs).mean(0))


@pytest.mark.parametrize("mean_after_first", [False, True])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_equals_a_network_for_each_sample(activation, latent, mean_after_first) -> None:
    deep = {"layers": 3, "latent": latent, "mean_after_first": mean_after_first}
    layer, x_TD = build(activation, deep=deep), tokens()
    y_TD, _ = layer(x_TD, context())
    y_loop = by_sample(layer, x_TD, context())
    torch.testing.assert_close(y_TD, y_loop, rtol=1e-9, atol=1e-9)
    names = [
        name
        for name, _ in layer.named_parameters()
        # The mean does not depend on what would have been the noise.
        if not (mean_after_first and "log_variance" in name and "routers.0" not in name)
    ]
    leaves = [x_TD, *(layer.get_parameter(name) for name in names)]
    results = zip(["x", *names], gradients(y_TD, leaves), gradients(y_loop, leaves), strict=True)
    for name, got, want in results:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=name)
        assert want.any(), name


def test_where_z_comes_from() -> None:
    x_TD = tokens()
    z = {}
    for latent in LATENTS:
        layer = build(deep={"latent": latent})
        z[latent] = [latents.z_TKZ for latents in layer.router(x_TD, context())]
        layer = build(deep={"latent": latent, "mean_after_first": True})
        first, second = layer.router(x_TD, context())
        assert torch.equal(first.z_TKZ, z[latent][0])
        if latent == "hierarchical":  # the mean of a distribution that each sample has of its own
            normed = F.rms_norm(first.z_TKZ[:, 1], (4,))
            assert torch.allclose(second.z_TKZ[:, 1], layer.router.routers[1].mean(normed))
        else:
            router = layer.router.routers[-1]
            assert torch.equal(second.z_TKZ[:, 1], router.mean(x_TD))
    assert torch.equal(z["shared"][0], z["shared"][1])
    for latent in ("independent", "hierarchical"):
        assert not torch.isclose(z[latent][0], z[latent][1]).any()


def test_fractions_do_not_multiply_to_nothing() -> None:
    layer = build(deep={"layers": 3}, active_fraction=0.25, ffn_dim=64)
    shares = [space.num_active / 64 for space in layer.spaces]
    assert math.prod(shares) == pytest.approx(0.25, rel=0.05)
    layer = build(deep={"layers": 2, "fractions": [0.25, 0.75]})
    assert [space.num_active for space in layer.spaces] == [WIDTH // 4, 3 * WIDTH // 4]


@pytest.mark.parametrize("mask", ["soft", "hard"])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("samples", "least"), [(1, 0.95), (2, 0.77)])
def test_the_scale_at_the_start(samples, least, activation, latent, mask) -> None:
    infinite = {"ffn_dim": 512, "mask": mask, "samples": samples, "deep": {"latent": latent}}
    torch.manual_seed(0)
    layer = MoEConfig.model_validate({"infinite": infinite}).build(dim=64, activation=activation)
    for name, parameter in layer.named_parameters():
        if "neurons" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    x_TD = torch.randn(400, 64)
    with torch.no_grad():
        y_TD, _ = layer(x_TD, context(valid_T=None, token_ids_T=torch.arange(400)))
        a_TF = activate(layer.neurons.up_proj(x_TD), activation)
        [second] = layer.deeper_neurons
        a_TF = activate(second(F.rms_norm(a_TF, a_TF.shape[-1:])), activation)
        ratio = (y_TD.std() / layer.neurons.down_proj(a_TF).std()).item()
    assert least < ratio < 1.05


def test_counts_are_those_of_all_layers() -> None:
    layer = build(deep={"fractions": [0.25, 0.5]}, samples=2)
    _, output = layer(tokens(), context())
    counts = output.stats.counts_E.view(2, WIDTH).sum(1)
    assert counts.tolist() == [10 * 2 * WIDTH // 4, 10 * 2 * WIDTH // 2]
    infinite = {"ffn_dim": WIDTH, "deep": {}}
    assert MoEConfig.model_validate({"infinite": infinite}).experts == 2 * WIDTH
