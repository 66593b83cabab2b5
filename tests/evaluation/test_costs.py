"""What profiles cost: counted by hand, and measured."""

import pytest
import torch
from evaluated import LAYERS, SEQ_LEN, batches, model_of

from dmoe.config.base import ConfigError
from dmoe.evaluation.costs import Costs, expert_costs, flop_costs, latency_costs
from dmoe.models import ModelConfig
from dmoe.models.counts import flops_per_token

PROFILES = [(1, 1, 1), (4, 4, 4), (2, 1, 3)]


@pytest.mark.parametrize("k_L", PROFILES)
def test_experts_are_a_sum(k_L) -> None:
    assert expert_costs(model_of().config, 4).of(k_L) == sum(k_L)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_are_those_of_the_model(family: str) -> None:
    config = ModelConfig.model_validate({**model_of().config.model_dump(), "family": family})
    costs = flop_costs(config, 4, seq_len=SEQ_LEN)
    for k in (1, 2, 4):
        assert costs.of((k,) * LAYERS) == flops_per_token(config, SEQ_LEN, training=False, k=k)
    # Two operations a weight, three matrices of 16 x 8 an expert where gated, else two.
    an_expert = 2 * (3 if family == "llama" else 2) * 16 * 8
    assert costs.of((2, 1, 3)) == costs.of((1, 1, 1)) + 3 * an_expert


@pytest.mark.parametrize(
    "leaf",
    [
        {"num_experts": 4, "expert_ffn_dim": 16, "num_shared_experts": 1},
        {"num_experts": 64, "expert_ffn_dim": 1, "router": {"name": "peer", "top_k": 3}},
        {"num_experts": 4, "expert_ffn_dim": 16, "infinite": {"granularity": "block"}},
        {"infinite": {"ffn_dim": 32, "samples": 3}},
        {"infinite": {"ffn_dim": 32, "samples": 3, "deep": {"layers": 3}}},
    ],
    ids=["experts", "peer", "blocks", "neurons", "deep neurons"],
)
def test_flops_of_layers_inside_are_those_of_the_model(leaf) -> None:
    sizes = {"vocab_size": 19, "dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24}
    moe = {"num_dense_layers": 1, "num_experts": 3, "expert_layer": leaf}
    config = ModelConfig.model_validate({**sizes, "moe": moe})
    costs = flop_costs(config, 3, seq_len=8)
    for k in (1, 2, 3):
        assert costs.of((k, k)) == flops_per_token(config, 8, training=False, k=k)


def test_seconds_grow_with_k_and_add_up() -> None:
    """With experts so wide that they are most of the work."""
    model = model_of(expert_ffn_dim=2048).float()
    model.compute_dtype = torch.float32
    costs = latency_costs(model, batches(8)[0], 4)
    assert [len(seconds_K) for seconds_K in costs.layers_LK] == [4] * LAYERS
    assert min(map(min, costs.layers_LK)) > 0
    assert costs.base >= 0
    assert costs.of((1, 1, 1)) < costs.of((4, 4, 4))


def test_measuring_leaves_no_trace() -> None:
    model = model_of()
    model.set_k(3)
    latency_costs(model, batches()[0], 2, num_repeats=1)
    assert not any(layer._forward_pre_hooks for layer in model.moe_layers)
    assert model._k_L == (3,) * LAYERS


COSTS = Costs("flops", 100.0, ((10.0, 20.0), (10.0, 20.0)))


def test_a_budget_within_is_good() -> None:
    for budget in (120, 130.5, 140):
        COSTS.check(budget)


@pytest.mark.parametrize(
    ("costs", "budget", "facts"),
    [
        (expert_costs(model_of().config, 4), 2, ["2 experts", "number of MoE layers", "3 to 12"]),
        (expert_costs(model_of().config, 4), 13, ["13 experts", "above 12", "--k-max"]),
        (expert_costs(model_of().config, 4), 4.5, ["4.5 experts", "whole number"]),
        (COSTS, 119, ["119 forward FLOPs a token", "below 120"]),
        (COSTS, 141, ["141 forward FLOPs a token", "above 140", "2 MoE layers"]),
    ],
)
def test_a_budget_without_a_choice_is_told_what_is_one(costs, budget, facts) -> None:
    with pytest.raises(ConfigError) as caught:
        costs.check(budget)
    for fact in facts:
        assert fact in str(caught.value)
