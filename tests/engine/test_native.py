"""The native engine by its features: clipping, precisions, recompute, evaluation, compile.

That no layout changes a number is test_invariance's.
"""

import math
from typing import Any

import pytest
import torch
from small_engine import LR, batches, full, gradients, small_engine, train, whole_state
from torch import Tensor

from dmoe.engine import NativeEngine
from dmoe.models import ModelInputs
from dmoe.testing import run_distributed


def copied_gradients(engine: NativeEngine) -> dict[str, Tensor]:
    return {name: full(p.grad) for name, p in engine.model.named_parameters()}


@pytest.mark.parametrize("share", [0.1, 2.0], ids=["above the limit", "below the limit"])
def test_clip_is_that_of_torch(share: float) -> None:
    ours, theirs = (small_engine(precision="fp64") for _ in range(2))
    for engine in (ours, theirs):
        result = gradients(engine)
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.model.parameters()]).item()
    assert ours.clip(share * norm) == pytest.approx(norm, rel=1e-12)
    torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), share * norm)
    for engine in (ours, theirs):
        engine.step(LR, result)
    for name, value in whole_state(theirs).items():
        # torch adds 1e-6 to the norm.
        torch.testing.assert_close(whole_state(ours)[name], value, rtol=1e-4, atol=1e-9)


def test_a_limit_of_zero_does_not_clip() -> None:
    engine = small_engine()
    gradients(engine)
    before = copied_gradients(engine)
    assert engine.clip(0.0) > 0
    after = copied_gradients(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_changes_no_bit(precision: str) -> None:
    """Routing is jittered: drawn a second time it would differ, and so would the gradients."""
    seen = {}
    for recompute in ("none", "selective", "full"):
        engine = small_engine(recompute=recompute, precision=precision)
        result = gradients(engine)
        seen[recompute] = copied_gradients(engine) | {"loss": torch.tensor(result.loss)}
    for recompute in ("selective", "full"):
        for name, value in seen["none"].items():
            assert torch.equal(seen[recompute][name], value), (recompute, name)


def bf16_beside_fp32(stages: tuple[int, ...] = (0,), ep: int = 1) -> None:
    exact = small_engine(ep=ep)
    expected = train(exact, steps=3)
    for stage in stages:
        engine = small_engine(ep=ep, precision="bf16", zero_stage=stage)
        losses = train(engine, steps=3)
        assert losses == pytest.approx(expected, rel=1e-2), stage
        assert losses != expected, "computed in float32 after all"
        gradients(engine, step=3)
        kept = dict(engine.model.named_parameters()) | {
            f"gradient of {name}": p.grad for name, p in engine.model.named_parameters()
        }
        kept |= {n: t for n, t in engine.state().items() if not n.endswith("expert_bias_E")}
        assert {name: t.dtype for name, t in kept.items() if t.dtype != torch.float32} == {}


def test_bf16_keeps_what_accumulates_in_float32() -> None:
    bf16_beside_fp32()


def test_fp16_skips_an_overflow_and_recovers() -> None:
    engine = small_engine(precision="fp16")
    engine.loss_scale.value = 2.0**40  # past what float16 gradients of activations can hold
    before = whole_state(engine)
    for halvings in range(1, 41):
        result = gradients(engine)
        norm = engine.clip(1.0)
        if math.isfinite(norm):
            break
        engine.skip()
        assert engine.loss_scale.value == 2.0 ** (40 - halvings)
    assert halvings > 1, "the first scale should overflow"
    after = whole_state(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)

    exact = small_engine()
    assert result.loss == pytest.approx(gradients(exact).loss, rel=1e-2)
    assert norm == pytest.approx(exact.clip(1.0), rel=2e-2), "the scale is taken out of the norm"
    for name, value in copied_gradients(exact).items():
        error = (copied_gradients(engine)[name] - value).norm()
        assert error <= 0.05 * value.norm() + 1e-6, name
    engine.step(LR, result)
    losses = train(engine, steps=3, first=1)
    assert all(map(math.isfinite, losses))


def test_the_loss_scale_goes_through_a_checkpoint() -> None:
    first, second = (small_engine(precision="fp16") for _ in range(2))
    train(first, steps=2)
    first.skip()
    second.load_state(second.state(), first.scalars())
    assert second.scalars() == first.scalars()
    assert second.scalars()["optimizer_steps"] == 2
    assert second.loss_scale.value == first.loss_scale.value == 2.0**15


def evaluation_leaves_no_trace(stage: int) -> None:
    """At stage 2 a pass without a backward leaves gathered parameters in place."""
    plain, watched = (small_engine(zero_stage=stage, precision="fp64") for _ in range(2))
    for engine in (plain, watched):
        train(engine, steps=1)
    [batch, *_] = batches(9, watched.dims)
    with torch.no_grad():
        watched.model(ModelInputs(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS))
    for steps in (0, 1):
        train(plain, steps, first=1)
        train(watched, steps, first=1)
        expected, state = whole_state(plain), whole_state(watched)
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(state[name], value), (stage, steps, name)


def on_two_ranks() -> None:
    bf16_beside_fp32(stages=(2,), ep=2)
    evaluation_leaves_no_trace(stage=2)


def test_precision_and_evaluation_on_sharded_parameters() -> None:
    run_distributed(on_two_ranks, 2)


def on_two_ranks_at_stage_3() -> None:
    bf16_beside_fp32(stages=(0, 3), ep=2)
    evaluation_leaves_no_trace(stage=3)


@pytest.mark.slow
def test_precision_and_evaluation_at_stage_3() -> None:
    run_distributed(on_two_ranks_at_stage_3, 2)


def compiled_equals_eager(**config: Any) -> None:
    eager = small_engine(**config)
    compiled = small_engine(compile=True, **config)
    assert train(compiled, steps=3) == pytest.approx(train(eager, steps=3), rel=1e-5)
    expected, state = whole_state(eager), whole_state(compiled)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=name)


def compiled_on_two_ranks() -> None:
    for stage in (0, 3):
        compiled_equals_eager(zero_stage=stage)


@pytest.mark.slow
def test_compiled_parts_equal_eager_ones() -> None:
    compiled_equals_eager()
    run_distributed(compiled_on_two_ranks, 2, timeout=280)
