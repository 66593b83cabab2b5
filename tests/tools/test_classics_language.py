"""The comparison of ways to balance and to choose: its measures by hand, and a run of seconds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "experiments"))
import classics_language as experiment
import classics_language_claims as claims
from classics_language_report import loss_after
from experiment_texts import texts_table


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
    options = ["--out", str(tmp_path), "--page", str(page), "--data", f"cats={text}"]
    assert CliRunner().invoke(experiment.app, ["report", *options]).exit_code == 0
    written = page.read_text()
    assert all(f"\n| {arm} |" in written for _, arm in arms)
    assert "not measured" not in written
    assert "| cats | `text.txt` | 9,600 | `" in written
    assert str(tmp_path) not in written
    options[-1] = f"dogs={text}"
    assert CliRunner().invoke(experiment.app, ["report", *options]).exit_code == 2


def _row(arm: str, seed: int, loss: float, **numbers: float) -> dict:
    return {"arm": arm, "seed": seed, "curve": [{"loss": loss, "seconds": 1.0}], **numbers}


def test_claims_on_balance_by_hand() -> None:
    """The global batch tells domains best in seed 0 alone; loss-free bias is best in all else."""
    numbers = {
        "none": (3.0, 9.0, 0.0),
        "micro-batch loss": (2.0, 0.5, 0.1),
        "global-batch loss": (2.5, 0.6, 0.2),
        "loss-free bias": (1.0, 0.1, 0.15),
    }
    rows = [
        _row(arm, seed, loss, max_violation=violation)
        | {"mutual_information": information * (1 - 2 * seed)}
        for arm, (loss, violation, information) in numbers.items()
        for seed in (0, 1)
    ]
    verdicts = [claim.verdict for claim in claims.of_balance(rows)]
    assert verdicts[:6] == ["holds in all 2"] * 6
    assert verdicts[6:] == ["does not hold in any of 2", "holds in 1 of 2", "holds in 1 of 2"]


def test_claims_on_choice_by_hand() -> None:
    numbers = {
        "top-1": (5.0, 1.0),
        "top-2": (4.0, 2.0),
        "top-4": (3.0, 4.0),
        "ReMoE": (3.5, 3.5),
        "expert threshold": (2.5, 3.9),
        "PEER": (1.0, 192.0),
    }
    active = {"top-4": 100, "PEER": 111}
    arms = {
        arm: [_row(arm, 0, loss, mean_k=k, max_violation=loss, active_params=active.get(arm, 100))]
        for arm, (loss, k) in numbers.items()
    }
    rows = [row for runs in arms.values() for row in runs]
    judged = claims.of_choice(rows, lambda row: -claims.final_loss(row), 25.4)
    verdicts = {claim.words: claim.verdict == "holds in all 1" for claim in judged}
    assert verdicts["Top-2 is better than top-1 a step"]
    assert not verdicts["Top-2 is better than top-1 after 25 s"], "the later loss is turned round"
    assert not verdicts["ReMoE is better than top-4 a step"]
    assert not verdicts["ReMoE ends within 5% of as many experts a token as top-4"]
    assert verdicts["It ends within 5% of as many experts a token as top-4"]
    assert verdicts["PEER is better than the best of the others a step"]
    assert "ReMoE ended at 3.50 of the 4 experts" in claims.inequalities(arms)
    assert "PEER has 11% more active parameters" in claims.inequalities(arms)
    del arms["PEER"]
    assert claims.inequalities(arms) == ""


def test_texts_are_named_without_their_folders(tmp_path: Path) -> None:
    """Files that the limit does not reach, and those that are no texts, are left out."""
    folder = tmp_path / "words"
    folder.mkdir()
    for name, text in {"a.txt": "abc", "b.txt": "d" * 9, "c.txt": "e", "d.md": "f"}.items():
        (folder / name).write_text(text)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    lines = texts_table({"w": str(folder)}, max_bytes=5).splitlines()[2:]
    assert lines[0] == f"| w | `words/a.txt` | 3 | `{digest}` |"
    assert [line.split(" | ")[1] for line in lines] == ["`words/a.txt`", "`words/b.txt`"]
