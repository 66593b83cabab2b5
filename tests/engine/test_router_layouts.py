"""Every way of routing gives the same step on any layout; `test_invariance` has the plain twin."""

from typing import Any

import pytest
import torch
from small_engine import full, gradients, small_engine, whole_state
from torch import Tensor

from dmoe.engine.sharding import global_view
from dmoe.testing import run_distributed

TOLERANCE = 1e-9
MODELS: dict[str, dict[str, Any]] = {
    "expert_choice": {"router": {"name": "expert_choice", "group": "micro_batch"}},
    "groups": {
        "router": {
            "name": "top_k",
            "score": "sigmoid",
            "bias_update_rate": 0.01,
            "groups": {"num": 4, "used": 2},
        },
        "losses": {"load_balance_weight": 0.1, "load_balance_scope": "sequence"},
    },
    "sparse_mixer": {"router": {"name": "sparse_mixer", "jitter": 0.3}},
    "relu": {"router": {"name": "relu", "target_k": 1, "penalty": 0.1}},
    "expert_threshold": {"router": {"name": "expert_threshold", "decay": 0.5}},
    "gshard": {
        "router": {"name": "top_k", "top_k": 2, "second_choice": "random"},
        "capacity": {"factor": 1.0, "minimum": 0, "group": 8},
        "losses": {"load_balance_scope": 8, "load_balance_choices": "first"},
    },
    "expert_dropout": {"expert_dropout": 0.4},
    "soft_gate": {"router": {"name": "soft_gate"}},
    "noisy_top_k": {"router": {"name": "noisy_top_k"}},
    "hierarchical": {"router": {"name": "hierarchical", "num_groups": 4}},
    "batchwise": {"router": {"name": "batchwise"}},
    "base_layer": {"router": {"name": "base_layer", "group": "micro_batch"}},
    "sinkhorn": {"router": {"name": "sinkhorn"}},
    "hash": {"router": {"name": "hash"}},
    "nested": {
        "router": {
            "name": "nested",
            "groups": 4,
            "outer": {"name": "sparse_mixer", "jitter": 0.3},
            "inner": {"name": "relu", "target_k": 1, "penalty": 0.1},
        },
        "zero_computation": {"zeros": 4, "constants": 4},
    },
    "soft_moe": {"router": {"name": "soft_moe", "slots": 2}},
    "peer": {
        "num_experts": 64,
        "expert_ffn_dim": 1,
        "router": {"name": "peer", "heads": 2, "top_k": 3},
    },
}
# (ep, stage, recompute) by world size.
LAYOUTS = {
    1: [(1, 0, "full")],
    2: [(1, 3, "none"), (2, 2, "selective")],
    4: [(4, 0, "full"), (2, 3, "none")],
}


def two_steps(moe: dict[str, Any], ep: int, stage: int, recompute: str) -> dict[str, Tensor]:
    """Return losses, gradients and the state after two steps."""
    engine = small_engine(ep=ep, recompute=recompute, moe=moe, precision="fp64", zero_stage=stage)
    seen: dict[str, Tensor] = {}
    for step in range(2):
        result = gradients(engine, step)
        seen[f"{step}.loss"] = torch.tensor(result.loss, dtype=torch.float64)
        for name, value in result.aux_losses.items():
            seen[f"{step}.{name}"] = torch.tensor(value, dtype=torch.float64)
        seen[f"{step}.counts"] = result.counts_LE
        for name, parameter in engine.model.named_parameters():
            seen[f"{step}.grad.{name}"] = full(global_view(name, parameter.grad, engine.dims))
        seen[f"{step}.norm"] = torch.tensor(engine.clip(1.0), dtype=torch.float64)
        engine.step(1e-2, result)
    return seen | whole_state(engine)


def of_world(world_size: int) -> dict[str, dict[str, Tensor]]:
    results = {
        f"{name} {layout}": two_steps(moe, *layout)
        for name, moe in MODELS.items()
        for layout in LAYOUTS[world_size]
    }
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return results if is_first else {}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {name: two_steps(moe, 1, 0, "none") for name, moe in MODELS.items()}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_equals_one_process(world_size: int, alone) -> None:
    if world_size == 1:
        results = of_world(1)
    else:
        results = run_distributed(of_world, world_size, world_size, timeout=240)[0]
    assert len(results) == len(MODELS) * len(LAYOUTS[world_size])
    for label, seen in results.items():
        expected = alone[label.split()[0]]
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            error = (seen[name].double() - value.double()).abs().max().item()
            assert error <= TOLERANCE, f"world {world_size}, {label}: {name} is off by {error}"


def test_the_routers_adapt_in_these_steps(alone) -> None:
    """The tests above would pass where nothing happens."""
    assert alone["relu"]["model.layers.1.moe.router.exponent"] != 0
    assert alone["expert_threshold"]["model.layers.1.moe.router.cutoff_E"].all()
    assert alone["groups"]["model.layers.1.moe.router.expert_bias_E"].any()
    assert alone["relu"]["1.relu_penalty"] > 0
