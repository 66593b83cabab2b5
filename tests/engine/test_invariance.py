"""Layout never changes numbers: design section 6, the test that matters most.

Steps in float64 on 1, 2 and 4 gloo ranks, for every (ep, edp, stage, recompute) and
accumulation, against one plain process that computes each expert in a loop and knows nothing of
this code's engine.
"""

import pytest
import torch
from plain_training import SIZES, engine_training, micro_batches, plain_training
from torch import Tensor

from dmoe.models import ModelConfig
from dmoe.moe.capacity import CapacityConfig
from dmoe.testing import run_distributed

TOLERANCE = 1e-9

ROUTER = {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01}
MOE = {
    "num_experts": 8,
    "expert_ffn_dim": 16,
    "num_shared_experts": 1,
    "router": ROUTER,
    "losses": {"load_balance_weight": 0.1, "z_loss_weight": 0.01},
}
MODEL = {**SIZES, "moe": {**MOE, "num_dense_layers": 1}}


def model_config(**moe: object) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL, "moe": {**MODEL["moe"], **moe}})


FIXED = {
    "global": model_config(),
    "sequence": model_config(losses={"load_balance_weight": 0.1, "load_balance_scope": "sequence"}),
    "micro_batch": model_config(
        losses={"load_balance_weight": 0.1, "load_balance_scope": "micro_batch"},
        capacity={"factor": 0.7, "policy": "score", "minimum": 0},
    ),
    # A capacity of nothing, which no configuration can ask for: every expert drops all its tokens.
    "starved": model_config(
        capacity=CapacityConfig.model_construct(
            factor=0.0, policy="position", minimum=0, group="sequence"
        )
    ),
}
VARYING = {
    "elastic": model_config(
        elastic={"k_max": 4, "budget": 5},
        capacity={"factor": 0.8, "policy": "score", "minimum": 0},
    ),
    "token_elastic": model_config(
        elastic={"k_max": 3, "k_ideal": 5, "granularity": "token", "normalize": False},
        losses={"load_balance_weight": 0.1, "load_balance_scope": "sequence"},
    ),
    "top_p": model_config(
        router={"name": "top_p", "p": 0.5, "controller": {"target_k": 3}},
        capacity={"factor": 1.0, "minimum": 0},
    ),
}


def infinite_config(**infinite: object) -> ModelConfig:
    section = {"ffn_dim": 64, "latent_dim": 4, **infinite}
    return ModelConfig.model_validate(
        {**MODEL, "moe": {"num_dense_layers": 1, "infinite": section}}
    )


INFINITE = {
    "neuron": infinite_config(),
    "block": infinite_config(granularity="block", block_size=8, mask="hard"),
    "deep": infinite_config(
        router={"name": "mixture", "components": 2}, deep={"latent": "hierarchical"}
    ),
}
INFINITE_LAYOUTS = {
    ("neuron", 1): [(1, 0, "full")],
    ("neuron", 2): [(1, 0, "none"), (1, 2, "none"), (1, 3, "full")],
    ("block", 1): [(1, 0, "selective")],
    ("block", 2): [(1, 2, "none"), (2, 3, "full")],
    ("block", 4): [(4, 0, "none"), (2, 3, "none")],
    ("deep", 2): [(1, 3, "none")],
}
MODELS = FIXED | VARYING | INFINITE


def send_everything_to_expert_zero(model: torch.nn.Module) -> None:
    """The bias of expert 0 wins every first choice, that of expert 1 every second one."""
    for layer in model.moe_layers:
        layer.router.expert_bias_E[0] = 10.0
        layer.router.expert_bias_E[1] = 5.0


# Enough steps for experts that never see a token to be in step with those that do.
COLLAPSED = {"num_steps": 6, "change": send_everything_to_expert_zero}


def layouts(world_size: int) -> list[tuple[int, int, str]]:
    """Every (ep, stage, recompute) of a world; recompute modes where cheap."""
    stages = [0, 2, 3] if world_size > 1 else [0]
    result = [(ep, stage, "none") for ep in (1, 2, 4) if world_size % ep == 0 for stage in stages]
    last_ep, last_stage, _ = result[-1]
    return [*result, (last_ep, last_stage, "selective"), (last_ep, last_stage, "full")]


def layouts_of(name: str, world_size: int) -> list[tuple[int, int, str]]:
    """Every layout; those that divide the most for what varies in its routing alone."""
    every = layouts(world_size)
    if name in FIXED:
        return every
    if name in INFINITE:
        return INFINITE_LAYOUTS.get((name, world_size), [])
    return [every[-3], every[-1]] if world_size < 4 else []


def all_layouts(world_size: int) -> dict[str, dict[str, Tensor]]:
    """Train every model under every layout of this world."""
    results = {}
    for name, config in MODELS.items():
        for layout in layouts_of(name, world_size):
            results[f"{name} {layout}"] = engine_training(config, *layout)
    last = layouts(world_size)[-1]
    results[f"collapsed {last}"] = engine_training(MODELS["global"], *last, **COLLAPSED)
    return (
        results
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        else {}
    )


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Tensor]]:
    plain = {name: plain_training(config) for name, config in MODELS.items()}
    return plain | {"collapsed": plain_training(MODELS["global"], **COLLAPSED)}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_equals_the_plain_process(world_size, references) -> None:
    if world_size == 1:
        results = all_layouts(1)
    else:
        results = run_distributed(all_layouts, world_size, world_size, timeout=240)[0]
    assert len(results) == sum(len(layouts_of(name, world_size)) for name in MODELS) + 1
    for label, seen in results.items():
        expected = references[label.split()[0]]
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            error = (seen[name].double() - value.double()).abs().max().item()
            assert error <= TOLERANCE, f"world {world_size}, {label}: {name} is off by {error}"


def test_the_collapsed_case_is_what_it_says(references) -> None:
    for step in range(COLLAPSED["num_steps"]):
        counts = references["collapsed"][f"{step}.counts"]
        assert (counts[:, 2:] == 0).all(), "an expert beyond the first two got a token"
    starved = references["starved"]
    assert torch.equal(starved["0.dropped"], starved["0.counts"].sum(1))


def test_the_number_of_experts_does_vary(references) -> None:
    num_tokens = sum(int(batch.valid_BS.sum()) for batch in micro_batches(0))
    elastic, per_token, top_p = (references[name] for name in VARYING)
    for step in range(2):
        slots = elastic[f"{step}.counts"].sum(1)
        assert slots[0] != slots[1]
        assert slots.sum() == 5 * num_tokens, "the budget"
        assert elastic[f"{step}.dropped"].sum() > 0
        assert (per_token[f"{step}.counts"].sum(1) % num_tokens != 0).all()
    assert top_p["model.layers.1.moe.router.p_shift"] != 0
