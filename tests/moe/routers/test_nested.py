"""Nested mixtures against layers that stand inside one another, forward and gradients."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from dmoe.config import load_config
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.moe.routers import NestedRouter, Router

TOKENS, DIM, LEAVES = 20, 8, 8
TOP_1, TOP_2 = {"name": "top_k", "top_k": 1, "normalize": False}, {"name": "top_k", "top_k": 2}
TWO = {
    "name": "nested",
    "groups": 4,
    "outer": TOP_2,
    "inner": {"name": "top_p", "p": 0.7, "normalize": False},
}
THREE = {
    "name": "nested",
    "groups": 2,
    "outer": TOP_1,
    "inner": {"name": "nested", "groups": 2, "outer": TOP_2, "inner": {"name": "relu"}},
}
CONTEXT = MoEContext(
    seq_len=TOKENS,
    token_ids_T=torch.arange(TOKENS) + 50,
    totals=BatchTotals(TOKENS, TOKENS, 1, 1),
    seed=1,
    step=2,
)


def fresh(**changes: object) -> MoEContext:
    return dataclasses.replace(CONTEXT, replay=type(CONTEXT.replay)(), **changes)


def build(router: dict[str, Any]) -> MoELayer:
    tree = {"num_experts": LEAVES, "expert_ffn_dim": 8, "router": router}
    layer = MoEConfig.model_validate(tree).build(dim=DIM, activation="gelu").double()
    assert isinstance(layer, MoELayer)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, DIM, generator=generator).double().requires_grad_()


def mixture_loop(router: Router, leaves: list[int], layer: MoELayer, x: Tensor) -> Tensor:
    """Define a mixture for one token: its experts are leaves, or mixtures of a share of them."""
    context = MoEContext(seq_len=1)
    chooser = router.outer if isinstance(router, NestedRouter) else router
    routing = chooser(x[None], context)
    y = 0 * x
    for expert, gate in zip(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0], strict=True):
        if expert < 0:
            continue
        if isinstance(router, NestedRouter):
            size = len(leaves) // len(router.inner)
            share = leaves[expert * size : (expert + 1) * size]
            y = y + gate * mixture_loop(router.inner[expert], share, layer, x)
        else:
            up, down = layer.experts.w_up_EFD, layer.experts.w_down_EDF
            hidden = F.gelu(up[leaves[expert]] @ x, approximate="tanh")
            y = y + gate * (down[leaves[expert]] @ hidden)
    return y


@pytest.mark.parametrize("router", [TWO, THREE], ids=["two levels", "three levels"])
def test_equals_mixtures_inside_one_another(router: dict[str, Any]) -> None:
    results = []
    for looped in (False, True):
        layer, x_TD = build(router), tokens()
        if looped:
            rows = [mixture_loop(layer.router, list(range(LEAVES)), layer, x) for x in x_TD]
            y_TD = torch.stack(rows)
        else:
            y_TD, _ = layer(x_TD, fresh())
        y_TD.square().sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
        results.append([y_TD.detach(), x_TD.grad, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_by_hand() -> None:
    """Probabilities 3/4 and 1/4 of two experts; in the first 2/3 and 1/3, in the other 4/5, 1/5."""
    top_2 = {"name": "top_k", "top_k": 2}
    tree = {"name": "nested", "groups": 2, "outer": top_2, "inner": top_2}
    config = MoEConfig.model_validate({"num_experts": 4, "expert_ffn_dim": 8, "router": tree})
    router = config.router.build(dim=1, num_experts=4).double()
    router.outer.gate.weight.data = torch.tensor([[3.0], [1.0]]).double().log()
    router.inner[0].gate.weight.data = torch.tensor([[2.0], [1.0]]).double().log()
    router.inner[1].gate.weight.data = torch.tensor([[1.0], [4.0]]).double().log()
    routing = router(torch.ones(1, 1).double(), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [[0, 1, 3, 2]]
    gates = [3 / 4 * 2 / 3, 3 / 4 * 1 / 3, 1 / 4 * 4 / 5, 1 / 4 * 1 / 5]
    assert routing.weights_TK[0].tolist() == pytest.approx(gates)
    scores = [gates[0], gates[1], gates[3], gates[2]]
    assert routing.scores_TE[0].tolist() == pytest.approx(scores)


def test_each_router_has_noise_and_losses_of_its_own() -> None:
    mixer = {"name": "sparse_mixer", "jitter": 9.0, "top_k": 1}
    inner = {"name": "relu", "penalty": 0.5, "balance": False}
    router = build({"name": "nested", "groups": 2, "outer": mixer, "inner": inner}).router
    same = torch.ones(TOKENS, DIM).double()
    for module in (router.outer, *router.inner):
        module.gate.weight.data.fill_(0.1)
    routing = router(same, fresh())
    assert 0 < routing.counts_E[:4].sum() < 4 * TOKENS, "the draws differ by token"
    # Four gates of 0.8 in the expert that each token came to.
    assert routing.losses["inner_relu_penalty"].item() == pytest.approx(0.5 * 4 * 0.8)
    twice = build({"name": "nested", "groups": 2, "outer": mixer, "inner": mixer}).router
    for module in (twice.outer, *twice.inner):
        module.gate.weight.data.fill_(0.1)
    outer = twice.outer(same, fresh().inside("outer")).expert_ids_TK[:, 0]
    inner_ids = [
        twice.inner[0](same, fresh().inside(f"inner {i}", torch.arange(TOKENS))).expert_ids_TK
        for i in range(2)
    ]
    assert not torch.equal(*inner_ids)
    assert not torch.equal(inner_ids[0][:, 0], outer)


@pytest.mark.parametrize("depth", [1, 2])
def test_by_sequences_inside_goes_by_the_rows_of_a_micro_batch(depth: int) -> None:
    """Of four sequences in two micro-batches; the weight of a loss does not depend on them."""
    found = []
    for scope in ("micro_batch", "sequence"):
        tree = {"name": "noisy_top_k", "top_k": 1, "balance_scope": scope}
        for _ in range(depth):
            tree = {"name": "nested", "groups": 2, "outer": TOP_1, "inner": tree}
        totals = BatchTotals(2 * TOKENS, 2 * TOKENS, 4, 2)
        context = fresh(seq_len=TOKENS // 2, totals=totals)
        found.append(build(tree).router(tokens(), context).losses)
    assert found[0] == found[1]
    assert len(found[0]) == 2
    assert all(found[0].values())


def test_routers_of_both_levels_adapt_to_their_own_tokens() -> None:
    bias = {"name": "top_k", "top_k": 1, "normalize": False, "bias_update_rate": 0.5}
    inner = {"name": "expert_threshold", "target_k": 1, "decay": 0.0}
    router = build({"name": "nested", "groups": 2, "outer": bias, "inner": inner}).router
    x_TD, num = tokens()[1:], TOKENS - 1
    context = {"seq_len": num, "token_ids_T": CONTEXT.token_ids_T[1:]}
    routing = router(x_TD, fresh(**context))
    outer = router.outer(x_TD, fresh(**context).inside("outer"))
    assert outer.counts_E[0] != outer.counts_E[1]
    means = {name: value / num for name, value in routing.sums.items() if value.ndim}
    router.end_step(routing.counts_E, num, means)
    sign = torch.sign(outer.counts_E.double().mean() - outer.counts_E)
    assert torch.equal(router.outer.expert_bias_E, 0.5 * sign)
    for group, module in enumerate(router.inner):
        rows = (outer.expert_ids_TK[:, 0] == group).nonzero()[:, 0]
        scores_RI = module.gate(x_TD[rows]).sigmoid()
        expected, _ = module.cutoffs(scores_RI, None)
        torch.testing.assert_close(module.thresholds(), expected.float(), check_dtype=False)


def test_warnings_of_all_levels_are_told_by_their_keys() -> None:
    deep = {"name": "nested", "groups": 2, "outer": {"name": "hash"}, "inner": {"name": "sinkhorn"}}
    outer = {"name": "expert_choice", "factor": 1}
    tree = {"name": "nested", "groups": 2, "outer": outer, "inner": deep}
    warning = build(tree).router.config.warning
    assert "model.moe.router.outer.name = expert_choice is not causal" in warning
    assert "model.moe.router.inner.inner.name = sinkhorn is not causal in training" in warning
    for name in ("batchwise", "base_layer"):
        inner = {**TWO, "inner": {"name": name}}
        moe = MoEConfig.model_validate({"num_experts": 8, "expert_ffn_dim": 8, "router": inner})
        assert moe.used_router.warning.startswith(f"model.moe.router.inner.name = {name} is not")
    assert build(TWO).router.config.warning == ""


@pytest.mark.parametrize(
    ("outer", "inner", "balanced"),
    [("hash", "relu", True), ("top_k", "relu", False), ("hash", "top_k", False)],
)
def test_the_balance_loss_is_off_where_both_levels_balance_themselves(
    outer: str, inner: str, balanced: bool
) -> None:
    router = {"name": "nested", "groups": 4, "outer": {"name": outer}, "inner": {"name": inner}}
    tree = {"num_experts": 16, "expert_ffn_dim": 8, "router": router}
    assert ("load_balance" not in MoEConfig.model_validate(tree).loss_weights()) == balanced


def test_a_nested_router_in_yaml(tmp_path) -> None:
    path = tmp_path / "nested.yaml"
    path.write_text(
        """
model:
  moe:
    num_experts: 16
    expert_ffn_dim: 8
    router:
      name: nested
      groups: 4
      outer: {name: top_k, top_k: 2}
      inner: {name: nested, groups: 2, outer: {name: top_k}, inner: {name: top_k, top_p: 1}}
"""
    )
    with pytest.raises(ValueError, match=r"nested.yaml:10: .*inner.inner.top_p: unknown key"):
        load_config(path)
    moe = load_config(path, ["model.moe.router.inner.inner={name: top_p, p: 0.3}"]).model.moe
    assert moe.router.inner.inner.p == 0.3
    assert moe.most_k == 2 * 2 * 2


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({**TWO, "groups": 3}, "router.groups = 3 does not divide num_experts = 8"),
        (
            {**TWO, "outer": {"name": "top_k", "top_k": 5}},
            "more than the experts of router.outer = 4",
        ),
        (
            {**TWO, "inner": {"name": "top_k", "top_k": 3}},
            "more than the experts of router.inner = 2",
        ),
        ({**TWO, "inner": {"name": "peer"}}, "router.inner.name = peer is a layer of its own kind"),
        ({**TWO, "inner": {**TWO, "groups": 3}}, "does not divide the experts of router.inner = 2"),
    ],
)
def test_what_does_not_fit_is_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(router)
