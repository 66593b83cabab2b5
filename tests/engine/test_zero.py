"""The contract of the DeepSpeed engine: the numbers of the native one, whatever ZeRO cuts up.

Both train three steps of the same batches on the same ranks. One launch runs many cases, since
DeepSpeed takes seconds to import.
"""

import dataclasses
import importlib
import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_engine import LR, MICRO_BATCH, batches, gradients, small_engine, whole_state
from small_engine import train as small_train
from torch import Tensor
from ways_of_routing import MODELS

from dmoe.engine import Engine, StepPosition
from dmoe.engine.zero_setup import load_deepspeed
from dmoe.models import ModelInputs
from dmoe.testing import run_distributed

NUM_STEPS = 3
WIDE = 16_384  # for a rank to have more than a megabyte, below which DeepSpeed swaps nothing
CLIP = 0.5  # gradients have norms of about 1

# The parameters of the rest are of the same kinds.
_LIKE_OTHERS = {"top_k", "switch", "ties", "top_p", "zero_computation", "forced_balance"}
_LIKE_OTHERS |= {"peer_batch_norm"}
ROUTERS = {name: moe for name, moe in MODELS.items() if name not in _LIKE_OTHERS}
INFINITE = {"ffn_dim": 64, "latent_dim": 4}
MOE: dict[str, dict[str, Any]] = ROUTERS | {
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


def build(case: Case, name: str, stage: int, **engine: Any) -> Engine:
    if name == "deepspeed" and case.precision == "fp16":
        # torch computes in float16 on every CPU, DeepSpeed refuses those without instructions.
        load_deepspeed(torch.device("cpu"))
        accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
        accelerator.is_fp16_supported = lambda: True
    return small_engine(
        name=name,
        zero_stage=stage,
        **engine,
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


def distance(case: Case, settings: dict[str, Any] | None = None) -> dict[str, float]:
    """How far DeepSpeed's run of a case is from the native one, by what is compared."""
    # Native's stages have the same numbers, and one of them is enough.
    expected = native(case._replace(stage=2))
    trained = train(build(case, "deepspeed", case.stage, deepspeed=settings or {}), case)
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


def check(world_size: int, cases: list[Case], tolerance: float, timeout: float = 280.0) -> None:
    for case, far in run_distributed(distances, world_size, cases, timeout=timeout)[0].items():
        assert max(far.values()) <= tolerance, f"{world_size} ranks, {case}: off by {far}"


def grid(eps: list[int], accumulations: tuple[int, ...], clips: tuple[float, ...]) -> list[Case]:
    return [Case(*values) for values in itertools.product((1, 2, 3), eps, accumulations, clips)]


QUICK = [
    Case(1, ep=2, accumulation=3),
    Case(2, ep=1, accumulation=3),
    Case(3, ep=2, accumulation=3),
    Case(3, ep=1, clip=0.0),
    Case(3, ep=2, model="matryoshka", recompute="full"),
    Case(2, ep=2, model="blocks", tokens="not on rank 0"),
]
FEATURES = [
    *(Case(s, 2, model=model) for s in (1, 2, 3) for model in ("matryoshka", "neurons", "blocks")),
    *(Case(s, 2, 2, tokens=t) for s in (1, 2, 3) for t in ("not on rank 0", "on one expert")),
    *(Case(s, 2, recompute=r) for s in (1, 2, 3) for r in ("selective", "full")),
]
ROUTING = [Case(stage, 2, 2, model=model) for stage in (1, 3) for model in ROUTERS]
HALF = [
    Case(stage, ep, 3, precision=precision)
    for stage in (1, 2, 3)
    for ep in (1, 2)
    for precision in ("bf16", "fp16")
]


def test_equals_native() -> None:
    check(2, QUICK, tolerance=1e-6)


def test_bf16_at_stage_1_equals_native() -> None:
    """It takes another optimizer class of DeepSpeed's than anything else."""
    check(2, [Case(1, ep=2, accumulation=3, precision="bf16")], tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "eps", "clip"),
    [(1, [1], CLIP), (1, [1], 0.0), (2, [1, 2], CLIP), (2, [1, 2], 0.0)]
    + [(4, [ep], clip) for ep in (2, 4) for clip in (CLIP, 0.0)]
    + [(8, [4], clip) for clip in (CLIP, 0.0)],
)
def test_every_layout_equals_native(world_size: int, eps: list[int], clip: float) -> None:
    check(world_size, grid(eps, (1, 3), (clip,)), tolerance=1e-6)


@pytest.mark.slow
def test_every_feature_equals_native() -> None:
    check(2, FEATURES, tolerance=1e-6)


@pytest.mark.slow
def test_every_way_of_routing_equals_native() -> None:
    """AdamW divides by moments that are tiny at first, and their last bits with them."""
    check(2, ROUTING, tolerance=5e-6)


@pytest.mark.slow
def test_an_odd_number_of_ranks_equals_native() -> None:
    check(3, grid([1], (1, 3), (CLIP,)), tolerance=1e-6)


@pytest.mark.slow
def test_half_precisions_equal_native() -> None:
    """Both round to 8 or 11 bits; where, is not the same.

    In float16 AdamW makes much of gradients that are hardly more than rounding.
    """
    check(2, [case for case in HALF if case.precision == "bf16"], tolerance=1e-4)
    check(2, [case for case in HALF if case.precision == "fp16"], tolerance=2e-4)


# Of each, what a large model makes DeepSpeed do: several buckets, several groups of parameters.
SETTINGS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 2, 3), {"reduce_bucket_size": 600, "allgather_bucket_size": 600}),
    ((1, 2, 3), {"overlap_comm": True}),
    ((1, 2, 3), {"contiguous_gradients": False}),
    ((1, 2, 3), {"offload_optimizer": {"device": "cpu"}}),
    ((3,), {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ((3,), {"sub_group_size": 700}),
    ((3,), {"stage3_param_persistence_threshold": 0}),
]


def distances_by_stage(
    stages: tuple[int, ...], setting: dict[str, Any], precision: str
) -> dict[int, dict[str, float]]:
    return {
        stage: distance(Case(stage, 2, 2, precision=precision), {"zero_optimization": setting})
        for stage in stages
    }


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "setting"), SETTINGS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-4)])
def test_settings_of_deepspeed_change_no_number(
    stages: tuple[int, ...], setting: dict[str, Any], precision: str, tolerance: float
) -> None:
    by_stage = run_distributed(distances_by_stage, 2, stages, setting, precision, timeout=280)[0]
    for stage, far in by_stage.items():
        assert max(far.values()) <= tolerance, f"stage {stage}: off by {far}"


def from_disk_and_from_memory(folder: Path, precision: str) -> None:
    """Train, save, load into another engine and go on, with state on a disk and in memory."""
    devices = {"nvme": {"device": "nvme", "nvme_path": str(folder)}, "cpu": {"device": "cpu"}}
    runs = {}
    for name, offload in devices.items():
        zero = {"offload_optimizer": offload, "sub_group_size": 300_000}

        def build_one(zero: dict[str, Any] = zero) -> Engine:
            settings = {"zero_optimization": zero}
            moe = {"ffn_dim": WIDE}
            config = {"name": "deepspeed", "zero_stage": 3, "precision": precision}
            return small_engine(ep=2, moe=moe, deepspeed=settings, **config)

        engine = build_one()
        losses = small_train(engine, steps=2)
        saved = whole_state(engine)
        again = build_one()
        state = again.state()
        for key, value in state.items():
            value.copy_(engine.state()[key])
        again.load_state(state, engine.scalars())
        losses += small_train(again, steps=2, first=2)
        runs[name] = (losses, saved, whole_state(again))
    assert list(folder.rglob("*exp_avg_sq*.swp")), "nothing lies on the disk"
    assert runs["nvme"][0] == runs["cpu"][0]
    for ours, theirs in zip(runs["nvme"][1:], runs["cpu"][1:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first run builds an extension
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimizer_state_on_nvme_is_that_in_memory(precision: str, tmp_path: Path) -> None:
    builders = pytest.importorskip("deepspeed.ops.op_builder")
    if not builders.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is not installed")
    run_distributed(from_disk_and_from_memory, 2, tmp_path, precision, timeout=1100)


def skipping_leaves_no_trace(case: Case) -> None:
    """Neither does looking: an evaluation, or a checkpoint."""
    plain, watched = (build(case, "deepspeed", case.stage) for _ in range(2))
    for engine in (plain, watched):
        small_train(engine, steps=1)
    gradients(watched, step=7)
    watched.clip(CLIP)
    watched.skip()
    [batch, *_] = batches(9, watched.dims)
    with torch.no_grad():
        watched.model(ModelInputs(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS))
    whole_state(watched)
    assert small_train(watched, 2, first=1) == small_train(plain, 2, first=1)
    expected, state = whole_state(plain), whole_state(watched)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def an_overflow_is_skipped(stage: int) -> None:
    engine = build(Case(stage, 2, precision="fp16"), "deepspeed", stage)
    engine.loss_scale.value = 2.0**40  # past what float16 gradients of activations can hold
    before = whole_state(engine)
    for halvings in range(1, 41):
        result = gradients(engine)
        norm = engine.clip(CLIP)
        if math.isfinite(norm):
            break
        engine.skip()
        assert engine.loss_scale.value == 2.0 ** (40 - halvings)
    assert halvings > 1, "the first scale should overflow"
    after = whole_state(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    exact = small_engine()
    assert result.loss == pytest.approx(gradients(exact).loss, rel=1e-2)
    assert norm == pytest.approx(exact.clip(CLIP), rel=2e-2), "the scale is taken out of the norm"
    engine.step(LR, result)
    assert all(map(math.isfinite, small_train(engine, steps=3, first=1)))


def one_step_is_not_taken() -> None:
    skipping_leaves_no_trace(Case(3, 2))
    an_overflow_is_skipped(stage=2)


def test_a_step_that_is_not_taken_leaves_no_trace() -> None:
    run_distributed(one_step_is_not_taken, 2, timeout=280)


def every_step_is_not_taken() -> None:
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            skipping_leaves_no_trace(Case(stage, 2, precision=precision))
        an_overflow_is_skipped(stage)


@pytest.mark.slow
def test_at_no_stage_does_a_step_that_is_not_taken_leave_a_trace() -> None:
    run_distributed(every_step_is_not_taken, 2, timeout=280)


def held_by_rank(stage: int) -> tuple[int, int, int]:
    """Elements of expert moments, dense moments and expert weights that this rank holds."""
    engine = build(Case(stage, ep=2), "deepspeed", stage)
    experts = [p for name, p in engine.own.items() if ".experts." in name]
    moments = sum(engine.optimizer.state[p]["exp_avg"].to_local().numel() for p in experts)
    inner = engine.zero.optimizer.optimizer.state.values()
    return (
        moments,
        sum(m["exp_avg"].numel() for m in inner),
        sum(p.to_local().numel() for p in experts),
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_shares_out_the_optimizer_state(stage: int) -> None:
    model = small_engine().model
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    dense = sum(
        size
        for name, size in sizes.items()
        if not any(part in name for part in (".experts.", ".gate.", "embed."))
    )
    for moments, dense_moments, weights in run_distributed(held_by_rank, 4, stage):
        assert moments == weights == experts // 4
        # DeepSpeed rounds its pieces up to pairs, and at stage 3 those of every parameter.
        assert dense // 4 <= dense_moments <= dense // 4 + 2 * len(sizes)
