"""The loop: who is called when, and what is due when."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from dmoe.trainer.build import open_run
from dmoe.trainer.loop import Callback, Trainer
from dmoe.trainer.step import StepRecord


class Note(Callback):
    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def on_start(self, trainer: Trainer) -> None:
        self.calls.append(f"{self.name} start {trainer.progress.step}")

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.calls.append(f"{self.name} step {trainer.progress.step}")

    def on_end(self, trainer: Trainer) -> None:
        self.calls.append(f"{self.name} end {trainer.progress.step}")


def test_callbacks_come_in_their_order_at_every_moment(token_store: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    with open_run(
        tiny_config(token_store, tmp_path, train={"steps": 2}), torch.device("cpu")
    ) as run:
        run.trainer.fit([Note("a", calls), Note("b", calls), Callback()])
    moments = ["start 0", "step 1", "step 2", "end 2"]
    assert calls == [f"{name} {moment}" for moment in moments for name in "ab"]


def test_what_is_due(token_store: Path, tmp_path: Path) -> None:
    with open_run(
        tiny_config(token_store, tmp_path, train={"steps": 7}), torch.device("cpu")
    ) as run:
        trainer = run.trainer
        due: dict[int, list[int]] = {0: [], 3: []}
        for step in range(1, 8):
            trainer.progress.step = step
            for every, steps in due.items():
                if trainer.due(every):
                    steps.append(step)
    assert due == {0: [7], 3: [3, 6, 7]}


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_save_can_be_continued_from(resume: str, token_store: Path, tmp_path: Path) -> None:
    first = tiny_config(token_store, tmp_path)
    with open_run(first, torch.device("cpu")) as run:
        run.trainer.progress.step = 4
        run.trainer.save()
    second = tiny_config(token_store, tmp_path, checkpoint={"resume": resume})
    with open_run(second, torch.device("cpu")) as run:
        assert run.trainer.progress.step == 4
        assert not run.trainer.done
