"""The contract of the DeepSpeed engine: the numbers of the native one, whatever ZeRO cuts up.

Both train three steps of the same batches on the same ranks. One launch runs many cases, since
DeepSpeed takes seconds to import.
"""

import dataclasses
import itertools
import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from small_engine import LR, MICRO_BATCH, batches, small_engine, whole_state
from torch import Tensor

from dmoe.engine import Engine, StepPosition
from dmoe.testing import run_distributed

NUM_STEPS = 3
CLIP = 0.5  # gradients have norms of about 1

INFINITE = {"ffn_dim": 64, "latent_dim": 4}
MOE: dict[str, dict[str, Any]] = {
    "plain": {},
    "matryoshka": {"elastic": {"k_min": 1, "k_max": 4, "granularity": "layer"}},
    "neurons": {"num_dense_layers": 1, "num_experts": None, "infinite": INFINITE},
    "blocks": {
        "num_dense_layers": 1,
        "num_experts": None,
        "infinite": {**INFINITE, "granularity": "block", "block_size": 8},
    },
}


class Case(NamedTuple):
    """One training run."""

    stage: int
    ep: int
    accumulation: int = 1
    clip: float = CLIP
    precision: str = "fp32"
    model: str = "plain"
    tokens: str = "on every rank"
    recompute: str = "none"


class Trained(NamedTuple):
    """What a run made."""

    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]


def build(case: Case, name: str, stage: int) -> Engine:
    return small_engine(
        name=name,
        zero_stage=stage,
        ep=case.ep,
        precision=case.precision,
        recompute=case.recompute,
        moe=MOE[case.model],
    )


def train(engine: Engine, case: Case) -> Trained:
    """Train, clipped as the case says."""
    dims, losses, norms = engine.dims, [], []
    num_micro_batches = dims.world_size * case.accumulation
    if case.tokens == "on one expert":
        for layer in engine.model.moe_layers:
            layer.router.expert_bias_E[:2] = torch.tensor([10.0, 5.0])
    for step in range(NUM_STEPS):
        own = batches(step, dims, num_micro_batches)
        if case.tokens == "not on rank 0" and dims.rank == 0:
            own = [padded(batch) for batch in own]
        place = StepPosition(3, step, num_micro_batches * MICRO_BATCH, num_micro_batches)
        result = engine.forward_backward(own, place)
        norms.append(engine.clip(case.clip))
        engine.step(LR, result)
        losses.append(result.loss)
    return Trained(losses, norms, whole_state(engine))


def padded(batch: Any) -> Any:
    """Return the micro-batch with nothing but padding in it."""
    return dataclasses.replace(
        batch,
        labels_BS=torch.full_like(batch.labels_BS, -100),
        document_ids_BS=torch.full_like(batch.document_ids_BS, -1),
    )


@cache
def native(case: Case) -> Trained:
    return train(build(case, "native", case.stage), case)


def distance(case: Case) -> dict[str, float]:
    """How far DeepSpeed's run of a case is from the native one, by what is compared."""
    # Native's stages have the same numbers, and one of them is enough.
    expected = native(case._replace(stage=2))
    trained = train(build(case, "deepspeed", case.stage), case)
    assert trained.state.keys() == expected.state.keys()
    far: dict[str, float] = {"loss": 0.0, "norm": 0.0, "model": 0.0, "optimizer": 0.0}
    for key, ours, theirs in (
        ("loss", trained.losses, expected.losses),
        ("norm", trained.norms, expected.norms),
    ):
        far[key] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    for name, value in expected.state.items():
        part, error = name.partition(".")[0], (trained.state[name] - value).abs().max().item()
        far[part] = max(far[part], error)
    return far


def distances(cases: list[Case]) -> dict[Case, dict[str, float]]:
    return {case: distance(case) for case in cases}


def check(world_size: int, cases: list[Case], tolerance: float, timeout: float = 120.0) -> None:
    for case, far in run_distributed(distances, world_size, cases, timeout=timeout)[0].items():
        assert max(far.values()) <= tolerance, f"{world_size} ranks, {case}: off by {far}"


def grid(eps: list[int], accumulations: tuple[int, ...], clips: tuple[float, ...]) -> list[Case]:
    return [Case(*values) for values in itertools.product((1, 2, 3), eps, accumulations, clips)]
