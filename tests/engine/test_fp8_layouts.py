"""Experts that multiply in eight bits: the same step on any layout."""

from typing import Any

import pytest
import torch
from plain_training import SIZES, engine_training, plain_training
from torch import Tensor

from dmoe.models import ModelConfig
from dmoe.testing import run_distributed

TOLERANCE = 1e-9
LAYOUTS = [(1, (1, 0, "none")), (2, (1, 2, "full")), (2, (2, 0, "selective"))]
WAYS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8, sent in fp8, computed again": {"dispatch_dtype": "fp8", "recompute_experts": True},
}


def config_of(**moe: Any) -> ModelConfig:
    sizes = SIZES | {"dim": 128, "num_layers": 2}
    router = {"name": "top_k", "top_k": 2, "bias_update_rate": 0.01}
    own = {"num_experts": 4, "expert_ffn_dim": 128, "num_dense_layers": 1, "router": router}
    return ModelConfig.model_validate({**sizes, "moe": {**own, **moe}})


def all_ways(layout: tuple[int, int, str]) -> dict[str, dict[str, Tensor]]:
    """Train each way on a layout; the first rank tells."""
    results = {
        name: engine_training(config_of(expert_dtype="fp8", **moe), *layout)
        for name, moe in WAYS.items()
    }
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return results if is_first else {}


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    return {n: plain_training(config_of(expert_dtype="fp8", **moe)) for n, moe in WAYS.items()}


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_every_layout_equals_the_plain_process(world_size: int, layout, plain) -> None:
    """In float64: there no sum is so close to a boundary of e4m3 that its order matters."""
    if world_size == 1:
        results = all_ways(layout)
    else:
        results = run_distributed(all_ways, world_size, layout, timeout=280)[0]
    for way, expected in plain.items():
        seen = results[way]
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            error = (seen[name].double() - value.double()).abs().max().item()
            assert error <= TOLERANCE, f"{world_size} ranks, {layout}, {way}: {name}, {error}"
