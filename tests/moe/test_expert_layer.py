"""Experts that are MoE layers: against plain loops, and against a router over all the leaves."""

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dmoe.config import load_config
from dmoe.models import ModelConfig
from dmoe.models.counts import activations, flops_per_token, num_active_params, params_by_kind
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer, SparseLayer
from dmoe.moe.nested import LayeredMoELayer
from dmoe.moe.stats import all_counts

TOKENS, DIM = 24, 8
TOP_1, TOP_2 = {"name": "top_k", "top_k": 1, "normalize": False}, {"name": "top_k", "top_k": 2}
LEAF = {"num_experts": 2, "expert_ffn_dim": 8, "router": TOP_1}
TWO = {"num_experts": 4, "router": TOP_2, "expert_layer": LEAF}
RICH = {
    "num_experts": 3,
    "expert_ffn_dim": 8,
    "num_shared_experts": 1,
    "router": TOP_2,
    "capacity": {"factor": 1.0, "minimum": 0, "group": "micro_batch"},
    "expert_layer": {
        "num_experts": 4,
        "expert_ffn_dim": 16,
        "num_shared_experts": 2,
        "zero_computation": {"copies": 1, "constants": 1},
        "router": {**TOP_2, "bias_update_rate": 0.5},
        "capacity": {"factor": 1.0, "minimum": 0, "group": "micro_batch"},
        "losses": {"load_balance_weight": 0.5, "z_loss_weight": 0.1},
    },
}
DEEP = {"num_experts": 2, "router": TOP_1, "expert_layer": {**TWO, "expert_layer": RICH}}
CONTEXT = MoEContext(
    seq_len=TOKENS,
    token_ids_T=torch.arange(TOKENS) + 50,
    totals=BatchTotals(TOKENS, TOKENS, 1, 1),
    seed=1,
    step=2,
)


def fresh(**changes: object) -> MoEContext:
    return dataclasses.replace(CONTEXT, replay=type(CONTEXT.replay)(), **changes)


def build(tree: dict[str, Any]) -> LayeredMoELayer:
    layer = MoEConfig.model_validate(tree).build(dim=DIM, activation="gelu").double()
    assert isinstance(layer, LayeredMoELayer)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, DIM, generator=generator).double().requires_grad_()


def gradients(layer: SparseLayer, x_TD: Tensor, y_TD: Tensor) -> list[Tensor]:
    y_TD.square().sum().backward()
    every = [x_TD, *layer.parameters()]
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in every]


def loop(layer: SparseLayer, x_D: Tensor) -> Tensor:
    """Define a mixture for one token, level by level; without capacity."""
    if not isinstance(layer, LayeredMoELayer):
        return layer(x_D[None], MoEContext(seq_len=1))[0][0]
    routing = layer.router(x_D[None], MoEContext(seq_len=1))
    y_D = 0 * x_D
    for expert, gate in zip(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0], strict=True):
        y_D = y_D + gate * loop(layer.layers[expert], x_D)
    if layer.shared_experts is not None:
        y_D = y_D + layer.shared_experts(x_D)
    return y_D


def without_capacity(tree: dict[str, Any]) -> dict[str, Any]:
    inside = tree.get("expert_layer")
    return {**tree, "capacity": None} | (
        {"expert_layer": without_capacity(inside)} if inside else {}
    )


@pytest.mark.parametrize("tree", [TWO, RICH, DEEP], ids=["two levels", "rich", "four levels"])
def test_equals_a_loop_over_tokens_and_levels(tree: dict[str, Any]) -> None:
    results = []
    for looped in (False, True):
        layer, x_TD = build(without_capacity(tree)), tokens()
        if looped:
            y_TD = torch.stack([loop(layer, x_D) for x_D in x_TD])
        else:
            y_TD, _ = layer(x_TD, fresh())
        results.append([y_TD.detach(), *gradients(layer, x_TD, y_TD)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_equals_a_router_over_all_leaves() -> None:
    """`router.name: nested` is the same in one dispatch, where levels are but routers."""
    layered, x_TD = build(TWO), tokens()
    router = {"name": "nested", "groups": 4, "outer": TOP_2, "inner": TOP_1}
    flat = MoEConfig.model_validate({"num_experts": 8, "expert_ffn_dim": 8, "router": router})
    one = flat.build(dim=DIM, activation="gelu").double()
    assert isinstance(one, MoELayer)
    one.router.outer.load_state_dict(layered.router.state_dict())
    for inner, layer in zip(one.router.inner, layered.layers, strict=True):
        inner.load_state_dict(layer.router.state_dict())
    for name, parameter in one.experts.named_parameters():
        parts = [layer.experts.get_parameter(name).detach() for layer in layered.layers]
        parameter.data.copy_(torch.cat(parts))
    y_TD, output = layered(x_TD, fresh())
    x_grad = gradients(layered, x_TD, y_TD)[0]
    x_again = tokens()
    want_TD, want = one(x_again, fresh())
    gradients(one, x_again, want_TD)
    torch.testing.assert_close(y_TD, want_TD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_grad, x_again.grad, rtol=1e-10, atol=1e-10)
    parts = [layer.experts.w_up_EFD.grad for layer in layered.layers]
    torch.testing.assert_close(torch.cat(parts), one.experts.w_up_EFD.grad, rtol=1e-10, atol=1e-10)
    assert torch.equal(all_counts(output.stats)[4:], want.stats.counts_E)


def test_by_hand() -> None:
    """One token; gates 3/4 and 1/4 of layers that double it and take it away four times."""
    linear = {"num_experts": 1, "expert_ffn_dim": 1, "router": TOP_1}
    layer = MoEConfig.model_validate({"num_experts": 2, "router": TOP_2, "expert_layer": linear})
    built = layer.build(dim=1, activation="relu").double()
    built.router.gate.weight.data = torch.tensor([[3.0], [1.0]]).double().log()
    for inner, factor in zip(built.layers, (2.0, -4.0), strict=True):
        inner.experts.w_up_EFD.data.fill_(1.0)
        inner.experts.w_down_EDF.data.fill_(factor)
    y_TD, _ = built(torch.ones(1, 1).double(), MoEContext(seq_len=1))
    assert y_TD.item() == pytest.approx(3 / 4 * 2 - 1 / 4 * 4)


def test_every_level_reports_its_own_slots_losses_and_drops() -> None:
    layer, x_TD = build(RICH), tokens()
    _, output = layer(x_TD, fresh())
    sums = output.stats.sums
    outer = layer.router(x_TD, fresh())
    assert torch.equal(output.stats.counts_E, outer.counts_E)
    # Room for TOKENS x 2 / 3 rows an expert.
    assert torch.equal(sums["within_rows"], outer.counts_E.clamp(max=16))
    assert output.stats.dropped == (outer.counts_E - 16).clamp(min=0).sum() > 0
    slots_En = sums["within_slots"].view(3, 6)
    assert torch.equal(slots_En.sum(1), 2 * sums["within_rows"])
    assert sums["within_dropped"] > 0
    assert output.losses.keys() == {"load_balance", "within_load_balance", "within_z"}
    weights = MoEConfig.model_validate(RICH).loss_weights()
    assert weights == {"load_balance": 0.01, "within_load_balance": 0.5, "within_z": 0.1}


def test_losses_of_layers_inside_are_the_sum_of_theirs() -> None:
    layer, x_TD = build(without_capacity(RICH)), tokens()
    _, output = layer(x_TD, fresh())
    outer, total = layer.router(x_TD, fresh()), 0.0
    for expert, inner in enumerate(layer.layers):
        rows = (outer.expert_ids_TK == expert).any(1)
        logits = inner.router(x_TD[rows], MoEContext(seq_len=int(rows.sum()))).logits_TE
        total += logits.logsumexp(1).square().sum() / TOKENS
    torch.testing.assert_close(output.losses["within_z"], total)


def test_routers_of_all_levels_adapt_to_their_own_tokens() -> None:
    rate = {"name": "top_k", "top_k": 1, "normalize": False, "bias_update_rate": 0.25}
    layer, x_TD = build({**DEEP, "router": rate}), tokens()
    _, output = layer(x_TD, fresh())
    chosen = layer.router(x_TD, fresh()).expert_ids_TK[:, 0]
    expected = []
    for i, middle in enumerate(layer.layers):
        x_RD = x_TD[chosen == i]
        ids = middle.router(x_RD, MoEContext(seq_len=len(x_RD))).expert_ids_TK
        for j, rich in enumerate(middle.layers):
            mine, alone = x_RD[(ids == j).any(1)], build(RICH)
            num = max(1, len(mine))
            _, own = rich(mine, MoEContext(seq_len=num))
            means = {n: v.double() / num for n, v in own.stats.sums.items() if v.ndim}
            alone.end_step(own.stats.counts_E, num, means)
            expected += [leaf.router.expert_bias_E for leaf in alone.layers]
    means = {n: v.double() / TOKENS for n, v in output.stats.sums.items() if v.ndim}
    layer.end_step(output.stats.counts_E, TOKENS, means)
    sign_E = torch.sign(TOKENS / 2 - output.stats.counts_E)
    assert torch.equal(layer.router.expert_bias_E, 0.25 * sign_E)
    leaves = [leaf for middle in layer.layers for rich in middle.layers for leaf in rich.layers]
    assert sum(bool(bias.any()) for bias in expected) > 12
    for leaf, bias_E in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.router.expert_bias_E, bias_E)


def test_a_layer_that_no_token_came_to_does_not_adapt() -> None:
    """Else a penalty of ReMoE would fall without end, as no token has too many experts there."""
    for tree in (
        {"num_experts": 2, "router": TOP_1, "expert_layer": {**LEAF, "router": {"name": "relu"}}},
        {
            "num_experts": 4,
            "expert_ffn_dim": 8,
            "router": {"name": "nested", "groups": 2, "outer": TOP_1, "inner": {"name": "relu"}},
        },
    ):
        layer = MoEConfig.model_validate(tree).build(dim=DIM, activation="gelu").double()
        outer, inner = (
            (layer.router, [one.router for one in layer.layers])
            if isinstance(layer, LayeredMoELayer)
            else (layer.router.outer, layer.router.inner)
        )
        outer.gate.weight.data = torch.stack((torch.ones(DIM), -torch.ones(DIM))).double()
        for router in inner:
            router.gate.weight.data.fill_(1.0)
        _, output = layer(tokens().abs(), fresh())
        means = {n: v.double() / TOKENS for n, v in output.stats.sums.items() if v.ndim}
        layer.end_step(output.stats.counts_E, TOKENS, means)
        assert [router.exponent.item() for router in inner] == [0, 0]
        inner[0].gate.weight.data.fill_(-1.0)
        _, output = layer(tokens().abs(), fresh())
        means = {n: v.double() / TOKENS for n, v in output.stats.sums.items() if v.ndim}
        layer.end_step(output.stats.counts_E, TOKENS, means)
        assert [router.exponent.item() for router in inner] == [-1, 0]


def test_a_tree_of_routers_inside_a_layer_adapts() -> None:
    rate = {"name": "top_k", "top_k": 1, "normalize": False, "bias_update_rate": 0.5}
    inside = {"name": "nested", "groups": 2, "outer": rate, "inner": rate}
    layer = build({**TWO, "expert_layer": {**LEAF, "num_experts": 4, "router": inside}})
    _, output = layer(tokens(), fresh())
    means = {n: v.double() / TOKENS for n, v in output.stats.sums.items() if v.ndim}
    layer.end_step(output.stats.counts_E, TOKENS, means)
    biases = [b for name, b in layer.named_buffers() if name.endswith("expert_bias_E")]
    assert len(biases) == 1 + 4 * 3
    assert sum(bool(bias.any()) for bias in biases) > 6


def test_a_hash_at_each_level_is_one_of_its_own() -> None:
    """Else of 4 x 4 experts only the diagonal would be used."""
    words = {"vocab_ids_T": torch.arange(TOKENS), "token_ids_T": torch.arange(TOKENS)}
    hashed, top = {"name": "hash"}, 4
    layer = build(
        {
            "num_experts": top,
            "router": hashed,
            "expert_layer": {**LEAF, "num_experts": top, "router": hashed},
        }
    )
    _, output = layer(tokens(), fresh(**words))
    slots = output.stats.sums["within_slots"].view(top, top)
    assert (slots > 0).sum() > 2 * top
    tree = {"name": "nested", "groups": top, "outer": hashed, "inner": hashed}
    flat = MoEConfig.model_validate({"num_experts": 16, "expert_ffn_dim": 8, "router": tree})
    _, output = flat.build(dim=DIM, activation="gelu").double()(tokens(), fresh(**words))
    assert (output.stats.counts_E > 0).sum() > 2 * top


def test_padding_comes_to_no_layer() -> None:
    valid_T = torch.arange(TOKENS) % 3 > 0
    layer, x_TD = build(TWO), tokens()
    y_TD, output = layer(x_TD, fresh(valid_T=valid_T))
    assert not y_TD[~valid_T].any()
    assert output.stats.sums["within_rows"].sum() == 2 * valid_T.sum()


def test_a_layer_without_tokens_has_gradients_of_zero() -> None:
    layer, x_TD = build(TWO), tokens()
    layer.router.gate.weight.data[2:] = -layer.router.gate.weight.data[:1] * 0 - 100
    y_TD, _ = layer(x_TD.abs(), fresh())
    y_TD.sum().backward()
    assert not layer.layers[3].experts.w_up_EFD.grad.any()
    assert layer.layers[0].experts.w_up_EFD.grad.any()


def test_noise_inside_differs_between_layers() -> None:
    tree = {**TWO, "router": {"name": "soft_gate"}, "expert_layer": {**LEAF, "router": {
        "name": "sparse_mixer", "jitter": 9.0, "top_k": 1}}}  # fmt: skip
    layer = build(tree)
    for inner in layer.layers:
        inner.router.gate.weight.data.fill_(0.1)
    _, output = layer(torch.ones(TOKENS, DIM).double(), fresh())
    slots_En = output.stats.sums["within_slots"].view(4, 2)
    assert len({tuple(row) for row in slots_En.tolist()}) > 1
    assert ((slots_En > 0) & (slots_En < TOKENS)).all()


SIZES = {"vocab_size": 19, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}


def model(moe: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, "moe": {"num_dense_layers": 1, **moe}})


def test_parameters_and_flops_count_what_a_token_uses() -> None:
    inside = {"num_experts": 4, "expert_ffn_dim": 8, "num_shared_experts": 1, "router": TOP_1}
    config = model({"num_experts": 3, "router": TOP_2, "expert_layer": inside})
    kinds = params_by_kind(config)
    expert = 3 * 16 * 8
    assert kinds["experts"] == 3 * 4 * expert
    assert kinds["shared_experts"] == 3 * expert
    assert kinds["router"] == 3 * 16 + 3 * 4 * 16
    # Two of three layers, and in each its router, its shared expert and one of four experts.
    unused = 4 * 16 + expert + (3 * 4 - 2) * expert
    assert num_active_params(config) == sum(kinds.values()) - unused
    used = sum(kinds.values()) - unused - kinds["norms"] - kinds["embedding"]
    attention = 4 * 2 * 16 * 32
    assert flops_per_token(config, 32, training=False) == 2 * used + attention
    assert num_active_params(config, k=3) == num_active_params(config) + 4 * 16 + 2 * expert


def test_memory_counts_the_rows_of_all_levels() -> None:
    def kept(**leaf: object) -> int:
        inside = {"num_experts": 4, "expert_ffn_dim": 8, "router": TOP_1, **leaf}
        config = model({"num_experts": 3, "router": TOP_2, "expert_layer": inside})
        sizes = {"num_tokens": 1, "seq_len": 8, "dtype": torch.float32, "recompute": "none"}
        return activations(config, **sizes, masked=False, exchanged=False).kept

    # Two rows of a token, gate and up of 8 each, in the one MoE layer.
    assert kept() - kept(recompute_experts=True) == 4 * 2 * 2 * 8
    assert kept(num_shared_experts=1) - kept() == 4 * 2 * 4 * 8


def test_three_levels_in_yaml(tmp_path) -> None:
    path = tmp_path / "levels.yaml"
    path.write_text(
        """
model:
  moe:
    num_experts: 4
    router: {name: top_k, top_k: 2}
    expert_layer:
      num_experts: 2
      router: {name: hash}
      expert_layer:
        num_experts: 4
        expert_ffn_dims: 8
"""
    )
    with pytest.raises(ValueError, match=r"levels.yaml:11: .*expert_ffn_dims: unknown key"):
        load_config(path)
    path.write_text(path.read_text().replace("dims", "dim"))
    inner = "model.moe.expert_layer.expert_layer"
    moe = load_config(path, [f"{inner}.router={{name: expert_choice}}"]).model.moe
    assert moe.num_leaves == 4 * 2 * 4
    assert f"{inner}.router.name = expert_choice is not causal" in moe.warning
    with pytest.raises(ValueError, match=rf"{inner}.num_experts = 4 is not a multiple of"):
        load_config(path, ["parallel.ep=3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ffn_dim": 8}, "expert_ffn_dim is for networks, but the experts of num_experts"),
        ({"expert_dropout": 0.1}, "expert_dropout is for networks"),
        ({"dispatch": "local"}, "dispatch is for networks"),
        ({"expert_dtype": "fp8"}, "expert_dtype is for networks"),
        ({"infinite": {"ffn_dim": 8}}, "infinite is for networks"),
        ({"router": {"name": "peer"}}, "router.name = peer is a layer of its own kind"),
        ({"expert_layer": {**LEAF, "every": 2}}, "expert_layer.every is for the layers of a model"),
        (
            {"expert_layer": {**LEAF, "elastic": {"k_min": 1, "k_max": 2}}},
            "expert_layer.elastic is for the layers of a model",
        ),
        (
            {"expert_layer": {**LEAF, "router": {"name": "soft_moe"}}},
            "expert_layer.router.name = soft_moe mixes whole sequences",
        ),
        (
            {"expert_layer": {**LEAF, "dispatch": "buffers", "capacity": {"factor": 1}}},
            "expert_layer.dispatch = buffers has ranks send as many rows",
        ),
        ({"num_shared_experts": 1}, "a number, of which num_shared_experts = 1 are made"),
        ({"expert_layer": {"num_experts": 2}}, "expert_ffn_dim is missing"),
        ({"expert_layer": {**LEAF, "router": {"name": "top_k", "top_k": 3}}}, "top_k = 3 is more"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({**TWO, **change})


def test_widths_inside_are_checked_by_their_keys() -> None:
    with pytest.raises(ValidationError, match=r"moe.expert_layer.expert_ffn_dim = 6 is not a mult"):
        model({"num_experts": 2, "expert_layer": {"num_experts": 4, "expert_ffn_dim": 6}})
