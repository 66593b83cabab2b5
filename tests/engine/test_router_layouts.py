"""Every way of routing gives the same step on any layout as the plain process.

Packed documents, padding, a micro-batch of padding alone; `ways_of_routing` has ties and experts
without a token.
"""

from typing import Any

import pytest
import torch
from plain_training import SIZES, engine_training, plain_training
from torch import Tensor
from ways_of_routing import MODELS

from dmoe.config.choices import names_of
from dmoe.models import ModelConfig
from dmoe.moe.routers import ROUTERS
from dmoe.testing import run_distributed

TOLERANCE = 1e-9
BASE: dict[str, Any] = {
    "num_experts": 8,
    "expert_ffn_dim": 16,
    "num_dense_layers": 1,
    "router": {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01},
}
# World size, and (ep, stage, recompute).
LAYOUTS = [(1, (1, 0, "full")), (2, (2, 2, "selective")), (4, (4, 0, "full"))]
SLOW = [(1, (1, 0, "none")), (2, (1, 3, "full")), (4, (2, 3, "none")), (4, (4, 2, "selective"))]


def config_of(name: str) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, "moe": {**BASE, **MODELS[name]}})


def all_ways(layout: tuple[int, int, str]) -> dict[str, dict[str, Tensor]]:
    """Train every model on a layout; the first rank tells."""
    results = {name: engine_training(config_of(name), *layout) for name in MODELS}
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return results if is_first else {}


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    return {name: plain_training(config_of(name)) for name in MODELS}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    LAYOUTS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_every_layout_equals_the_plain_process(world_size: int, layout, plain) -> None:
    if world_size == 1:
        results = all_ways(layout)
    else:
        results = run_distributed(all_ways, world_size, layout, timeout=280)[0]
    assert results.keys() == plain.keys()
    for model, expected in plain.items():
        seen = results[model]
        assert seen.keys() == expected.keys(), model
        for name, value in expected.items():
            error = (seen[name].double() - value.double()).abs().max().item()
            assert error <= TOLERANCE, f"{world_size} ranks, {layout}, {model}: {name}, {error}"


def test_every_router_is_there() -> None:
    registered = {name for section in ROUTERS for name in names_of(section)}
    sections = [{**BASE, **moe}["router"] for moe in MODELS.values()]
    assert {section["name"] for section in sections} == registered


def test_the_routers_adapt_in_these_steps(plain) -> None:
    """The tests above would pass where nothing happens."""
    state = "model.layers.1.moe.router"
    assert plain["relu"][f"{state}.exponent"] != 0
    assert plain["expert_threshold"][f"{state}.cutoff_E"].all()
    assert plain["top_p"][f"{state}.p_shift"] != 0
    assert plain["peer_batch_norm"][f"{state}.gate.query_norm.square_F"].all()
    for name in ("groups", "zero_computation"):
        assert plain[name][f"{state}.expert_bias_E"].any()
    assert plain["expert_layer"]["model.layers.2.moe.router.expert_bias_E"].any()
    inside = "model.layers.1.moe.layers.{}.layers.{}.router.expert_bias_E"
    biases = [plain["expert_layer"][inside.format(i, j)] for i in range(3) for j in range(2)]
    assert all(bias.any() for bias in biases)
    assert not torch.equal(biases[0], biases[1])
    assert plain["expert_layer"]["model.layers.2.moe.layers.0.router.exponent"] != 0
    peer = "model.layers.1.moe.layers.0.router.gate.query_norm.square_F"
    assert plain["peer_inside"][peer].all()
    for name in ("load_balance", "within_relu_penalty", "within_within_z"):
        assert plain["expert_layer"][f"0.{name}"] > 0
    assert plain["relu"]["1.relu_penalty"] > 0
    assert plain["ties"]["0.counts"][:, 2:].sum() == 0, "ties go to the first two"
    assert plain["switch"]["0.dropped"].sum() > 0
