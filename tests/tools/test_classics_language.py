"""The comparison of ways to balance and to choose: its measures by hand, and a run of seconds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "experiments"))
import classics_language as experiment
from classics_language_report import loss_after


def test_mutual_information_by_hand() -> None:
    """Two domains: experts of their own tell one bit, shared ones nothing; the mean of layers."""
    apart, shared = [[8, 0], [0, 8]], [[4, 4], [4, 4]]
    counts_MLE = np.array([apart, shared], dtype=float).transpose(1, 0, 2)
    assert experiment.mutual_information(counts_MLE) == pytest.approx(0.5)


def test_the_loss_at_a_time_by_hand() -> None:
    curve = [{"seconds": 2.0, "loss": 4.0}, {"seconds": 6.0, "loss": 2.0}]
    for seconds, loss in ((1, 4.0), (2, 4.0), (3, 3.5), (6, 2.0), (9, 2.0)):
        assert loss_after({"curve": curve}, seconds) == pytest.approx(loss)


def test_a_run_of_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and started again it trains what is left, and the page has a row an arm."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat; " * 400)
    monkeypatch.setattr(experiment, "BUILTIN_STDLIB", str(text))
    monkeypatch.setattr(experiment, "SEQ_LEN", 16)
    monkeypatch.setattr(experiment, "EVAL_BATCHES", 1)
    options = ["--out", str(tmp_path), "--data", f"cats={text}", "--steps", "2", "--seeds", "1"]
    for _ in range(2):
        result = CliRunner().invoke(experiment.app, ["train", *options], catch_exceptions=False)
        assert result.exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    arms = [(row["experiment"], row["arm"]) for row in rows]
    assert arms == [(name, arm) for name, group in experiment.ARMS.items() for arm in group]
    active = {row["arm"]: row["active_params"] for row in rows if row["experiment"] == "choice"}
    assert max(active.values()) / min(active.values()) < 1.2
    page = tmp_path / "page.md"
    options = ["--out", str(tmp_path), "--page", str(page)]
    assert CliRunner().invoke(experiment.app, ["report", *options]).exit_code == 0
    assert all(f"\n| {arm} |" in page.read_text() for _, arm in arms)
