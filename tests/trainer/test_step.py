"""One step: what it counts, and that a bad number on any one rank makes all of them skip it."""

import math
import re
from contextlib import nullcontext
from pathlib import Path

import poison
import pytest
import torch
import torch.distributed as dist
from tiny import tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.optim import learning_rate_factor
from dmoe.testing import run_distributed
from dmoe.trainer.build import Run, open_run
from dmoe.trainer.nonfinite import NonFiniteError
from dmoe.trainer.step import StepRecord, train_step

LAST_RANK = 1


def take_step(run: Run, bad: poison.Poison | None = None) -> StepRecord:
    """Take the next step, poisoned on this rank if told so."""
    trainer = run.trainer
    with bad(trainer.engine) if bad else nullcontext():
        return train_step(run.config, trainer.engine, trainer.loader.next_step(), trainer.progress)


def local_state(run: Run) -> dict[str, Tensor]:
    """Copy what this rank holds of parameters, moments and biases, and the optimizer's count."""
    state = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in run.trainer.engine.state().items()
    }
    return state | {"count": torch.tensor(run.trainer.engine.scalars()["optimizer_steps"])}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def expected_lr(run: Run, applied: int) -> float:
    optim = run.config.optim
    return optim.lr * learning_rate_factor(optim.schedule, applied, run.config.train.steps)


def skip_and_go_on(run: Run, bad: poison.Poison | None) -> None:
    """A poisoned step between two good ones changes nothing but the counters."""
    progress = run.trainer.progress
    applied, step, skipped = progress.optimizer_steps, progress.step, progress.skipped
    before = local_state(run)
    record = take_step(run, bad)
    assert record.skipped
    assert not (math.isfinite(record.result.loss) and math.isfinite(record.grad_norm))
    assert changed(before, local_state(run)) == set()
    counters = (progress.step, progress.skipped, progress.skipped_in_a_row)
    assert counters == (step + 1, skipped + 1, 1)

    record = take_step(run)
    assert not record.skipped
    assert math.isfinite(record.grad_norm)
    assert record.lr == expected_lr(run, applied), "the schedule counts applied steps alone"
    assert progress.optimizer_steps == applied + 1
    assert progress.skipped_in_a_row == 0
    after = local_state(run)
    moved = changed(before, after)
    assert "count" in moved
    assert any(name.endswith("expert_bias_E") for name in moved)
    assert not any(torch.isnan(tensor).any() for tensor in after.values())


def give_up(run: Run, bad: poison.Poison | None) -> str:
    """Poison one step after the other until the run ends, and return why it did."""
    limit = run.config.train.max_skipped_steps
    for _ in range(limit - 1):
        assert take_step(run, bad).skipped
    with pytest.raises(NonFiniteError) as caught:
        take_step(run, bad)
    run.trainer.engine.skip()
    run.trainer.progress.skipped_in_a_row = 0
    return str(caught.value)


def poison_the_last_rank(store: Path, folder: Path, stages: list[int]) -> dict[str, str]:
    """Do all of the above for every poison; return why the run ended on this rank."""
    is_last = dist.get_rank() == LAST_RANK
    messages = {}
    for stage in stages:
        config = tiny_config(
            store,
            folder / str(stage),
            engine={"zero_stage": stage},
            parallel={"ep": 2},
            train={"steps": 40},
        )
        with open_run(config, torch.device("cpu")) as run:
            take_step(run)
            for name, bad in poison.ALL.items():
                skip_and_go_on(run, bad if is_last else None)
                messages[f"{name} {stage}"] = give_up(run, bad if is_last else None)
            take_step(run)
    return messages


PLACES = {
    "expert_gradient": "the gradient of layers.1.moe.experts.w_down_EDF is not",
    "gate_gradient": "the gradient of layers.1.moe.router.gate.weight is not",
    "embedding_row": "the output of embed was the first that is not finite",
    "parameter": "parameter layers.1.attn.o_proj.weight is not finite",
    "loss": "the forward pass is finite; the gradient of lm_head.weight is not",
}


def check_messages(by_rank: list[dict[str, str]], stage: int) -> None:
    for name, place in PLACES.items():
        for messages in by_rank:
            assert "2 steps in a row (train.max_skipped_steps)" in messages[f"{name} {stage}"]
        assert by_rank[LAST_RANK][f"{name} {stage}"].endswith(place), name
    assert by_rank[0][f"expert_gradient {stage}"].endswith("another rank tells the place")


def test_a_bad_number_on_one_rank_is_skipped_by_all(token_store: Path, tmp_path: Path) -> None:
    by_rank = run_distributed(poison_the_last_rank, 2, token_store, tmp_path, [0, 3])
    for stage in (0, 3):
        check_messages(by_rank, stage)


def test_gives_up_after_so_many_in_a_row_and_not_in_all(token_store: Path, tmp_path: Path) -> None:
    config = tiny_config(token_store, tmp_path, train={"max_skipped_steps": 3, "steps": 20})
    with open_run(config, torch.device("cpu")) as run:
        for _ in range(2):
            for _ in range(2):
                assert take_step(run, poison.loss).skipped
            assert not take_step(run).skipped
        assert run.trainer.progress.skipped == 4
        assert run.trainer.progress.optimizer_steps == 2
        assert re.search(r"loss \(nan\).*3 steps in a row .* step 9;", give_up(run, poison.loss))


def test_counts_steps_tokens_and_rate(token_store: Path, tmp_path: Path) -> None:
    schedule = {"name": "linear", "warmup_steps": 2, "final_fraction": 0.5}
    config = tiny_config(token_store, tmp_path, optim={"lr": 0.1, "schedule": schedule})
    train = config.train
    with open_run(config, torch.device("cpu")) as run:
        rates = []
        for step in range(1, train.steps + 1):
            record = take_step(run)
            rates.append(record.lr)
            assert run.trainer.progress.step == step
        assert run.trainer.progress.tokens <= train.steps * train.global_batch_size * train.seq_len
        assert run.trainer.progress.tokens > 0
        assert run.trainer.done
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1 - 0.05 / 3, 0.1 - 0.1 / 3, 0.05])


def test_the_step_is_clipped_to_the_configured_norm(token_store: Path, tmp_path: Path) -> None:
    """With a huge eps AdamW is nearly SGD with momentum, so a clipped step is shorter."""
    moves = {}
    for name, limit in (("free", 0.0), ("clipped", 0.25)):
        optim = {"lr": 1.0, "eps": 1e3, "weight_decay": 0.0, "max_grad_norm": limit}
        config = tiny_config(token_store, tmp_path / name, optim=optim)
        with open_run(config, torch.device("cpu")) as run:
            before = local_state(run)
            norm = take_step(run).grad_norm
            after = local_state(run)
        moves[name] = {n: after[n] - before[n] for n in before if n.startswith("model.layers")}
    assert norm > 0.25
    for name, move in moves["free"].items():
        if not name.endswith("expert_bias_E"):
            clipped, expected = moves["clipped"][name], move * 0.25 / norm
            torch.testing.assert_close(clipped, expected, rtol=1e-4, atol=1e-12)
