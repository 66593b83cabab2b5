"""Zero, copy and constant experts against a loop; the bias that steers to a number of networks."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dmoe.models import ModelConfig
from dmoe.models.counts import flops_per_token, num_active_params, params_by_kind
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer

TOKENS, DIM, NETWORKS = 24, 8, 4
ZERO = {"zeros": 1, "copies": 2, "constants": 2}
ROUTER = {"name": "top_k", "top_k": 3, "normalize": False}
TREE = {"num_experts": NETWORKS, "expert_ffn_dim": 8, "zero_computation": ZERO, "router": ROUTER}


def build(**changes: object) -> MoELayer:
    layer = MoEConfig.model_validate({**TREE, **changes}).build(dim=DIM, activation="gelu").double()
    assert isinstance(layer, MoELayer)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def tokens(seed: int = 2) -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).double()


def context(**changes: object) -> MoEContext:
    return MoEContext(seq_len=TOKENS, totals=BatchTotals(TOKENS, TOKENS, 1, 1), **changes)


def layer_loop(layer: MoELayer, x_TD: Tensor, ids: list[list[int]], gates: Tensor) -> Tensor:
    """Define the layer for a given routing: one expert after the other."""
    rows = []
    up, down = layer.experts.w_up_EFD, layer.experts.w_down_EDF
    zero = layer.zero_computation
    for x, experts, weights in zip(x_TD, ids, gates, strict=True):
        y = 0 * x
        for expert, gate in zip(experts, weights, strict=True):
            if 0 <= expert < NETWORKS:
                hidden = torch.nn.functional.gelu(up[expert] @ x, approximate="tanh")
                y = y + gate * (down[expert] @ hidden)
            elif expert in (5, 6):
                y = y + gate * x
            elif expert in (7, 8):
                c = expert - 7
                mixed = torch.stack([zero.mix.weight[c] @ x, zero.mix.weight[2 + c] @ x]).softmax(0)
                y = y + gate * (mixed[0] * x + mixed[1] * zero.constants_CD[c])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loop(padded: bool) -> None:
    results = []
    valid_T = torch.arange(TOKENS) % 4 > 0 if padded else None
    for looped in (False, True):
        layer, x_TD = build(), tokens().requires_grad_()
        place = context(valid_T=valid_T)
        if looped:
            routing = layer.router(x_TD, place)
            y_TD = layer_loop(layer, x_TD, routing.expert_ids_TK.tolist(), routing.weights_TK)
        else:
            y_TD, output = layer(x_TD, place)
            assert output.stats.counts_E.all(), "every kind is chosen"
            assert len(output.stats.counts_E) == NETWORKS + 5
            assert not output.stats.dropped
        y_TD.square().sum().backward()
        results.append([y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_capacity_is_for_networks_alone() -> None:
    layer = build(capacity={"factor": 0.5, "minimum": 0})
    _, output = layer(tokens(), context())
    slots = int(output.stats.counts_E[:NETWORKS].sum())
    assert 0 < output.stats.dropped <= slots - 4 * (slots // 8)


@pytest.mark.parametrize("kind", ZERO)
def test_one_kind_alone_and_no_tokens(kind: str) -> None:
    layer = build(zero_computation={kind: 2})
    for x_TD in (tokens(), tokens()[:0]):
        y_TD, _ = layer(x_TD, MoEContext(seq_len=TOKENS))
        assert y_TD.shape == x_TD.shape
        y_TD.sum().backward()


def test_the_bias_steers_to_a_number_of_networks() -> None:
    """2.25 networks and 0.75 others of 3 experts a token, each kind evenly."""
    router = {**ROUTER, "bias_update_rate": 0.01, "score": "sigmoid"}
    layer = build(router=router, zero_computation={**ZERO, "target_k": 2.25})
    layer.router.gate.weight.data *= 0.3
    counts = torch.zeros(NETWORKS + 5)
    for step in range(400):
        counts_E = layer.router(tokens(step), context()).counts_E
        layer.end_step(counts_E, TOKENS)
        counts += counts_E if step >= 200 else 0
    mean_E = counts / 200 / TOKENS
    assert mean_E[:NETWORKS].sum().item() == pytest.approx(2.25, rel=0.03)
    assert mean_E[:NETWORKS].tolist() == pytest.approx([2.25 / 4] * 4, rel=0.1)
    assert mean_E[NETWORKS:].tolist() == pytest.approx([0.75 / 5] * 5, rel=0.2)


def test_a_token_counts_for_the_networks_it_has() -> None:
    """4 of 9 experts are networks, so of 3 experts 4 / 3 are; or as many as are steered to."""
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    plain = ModelConfig.model_validate({**sizes, "moe": TREE})
    router = {**ROUTER, "bias_update_rate": 0.1}
    moe = {**TREE, "router": router, "zero_computation": {**ZERO, "target_k": 2}}
    steered = ModelConfig.model_validate({**sizes, "moe": moe})
    counts = params_by_kind(plain)
    assert counts["zero_computation"] == 2 * (2 * 16 + 4 * 16)
    for config, networks in ((plain, 4 / 3), (steered, 2.0)):
        idle = round(counts["experts"] * (4 - networks) / 4)
        assert num_active_params(config) == sum(counts.values()) - idle
    difference = flops_per_token(steered, 8) - flops_per_token(plain, 8)
    assert difference == pytest.approx(6 * counts["experts"] / 4 * (2 - 4 / 3), abs=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_computation": {}}, "are all 0: leave the section out"),
        ({"zero_computation": {"zeros": 1, "target_k": 2}}, "set router.bias_update_rate"),
        (
            {
                "zero_computation": {"zeros": 1, "target_k": 3},
                "router": {**ROUTER, "bias_update_rate": 0.1},
            },
            "target_k = 3 is not below the 3 experts of a token",
        ),
        (
            {"infinite": {"ffn_dim": 64, "granularity": "block", "block_size": 8}},
            "zero_computation stands beside experts that tokens are sent to, which infinite",
        ),
        (
            {"num_experts": 16, "expert_ffn_dim": 1, "router": {"name": "peer", "top_k": 2}},
            "zero_computation stands beside experts that tokens are sent to",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({**TREE, **changes})


def test_more_experts_than_networks_can_be_asked_for() -> None:
    for k, expected in itertools.product([8], [8]):
        config = MoEConfig.model_validate({**TREE, "router": {**ROUTER, "top_k": k}})
        assert config.most_k == expected
