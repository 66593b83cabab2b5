"""The experiment on classical mixtures, at a size that takes seconds."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmoe.data import prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "experiments"))
import classics
import classics_mixtures
from classics_arms import ARMS, arm_config
from classics_report import write_report

TINY = [
    "model.dim=16",
    "model.num_heads=2",
    "model.moe.expert_ffn_dim=8",
    "model.max_seq_len=16",
    "train.seq_len=16",
    "train.steps=5",
    "optim.schedule.warmup_steps=1",
]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the output folder of `train` with one language arm and one seed, on a text of ours."""
    text = tmp_path / "words.txt"
    text.write_text("\n\n".join(f"{n * n} experts of {n}" for n in range(400)))
    monkeypatch.setattr(classics_mixtures, "EPOCHS", 3)
    monkeypatch.setattr(classics, "ARMS", {"importance and load": ["0.1, 0.1"]})
    store = str(tmp_path / "store")
    prepare([str(text)], store, holdout=0.2, split_paragraphs=True)
    data = f"data.sources={json.dumps([{'path': store}])}"
    command = ["train", "--out", str(tmp_path / "out"), "--seeds", "1", *TINY, data]
    for _ in range(2):  # the second time all is there
        result = CliRunner().invoke(classics.app, command)
        assert result.exit_code == 0, result.output
    assert result.output == ""
    return tmp_path / "out"


def test_runs_are_measured_and_reported(out: Path) -> None:
    mixtures = [json.loads(line) for line in (out / "mixtures.jsonl").open()]
    assert [row["system"] for row in mixtures] == list(classics_mixtures.SYSTEMS)
    tuning = [json.loads(line) for line in (out / "tuning.jsonl").open()]
    assert len(tuning) == 3 + 3 + 9 + 3
    assert {row["num_params"] for row in mixtures} == {24, 25}
    [row] = [json.loads(line) for line in (out / "language.jsonl").open()]
    assert 0 < row["loss"] < 10
    assert row["early_step"] == 5
    assert row["moe/load_max_over_mean_mean"] >= 1
    page = out / "page.md"
    result = CliRunner().invoke(classics.app, ["report", "--out", str(out), "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert "| 0.1, 0.1 | 1 |" in page.read_text()
    assert "## Capacity" not in page.read_text(), "no run of it is there"


def test_the_report_has_mean_and_spread(tmp_path: Path) -> None:
    rows = [
        {"group": "top-1", "arm": "capacity 1", "steps": 2, "tokens": 10, "loss": loss}
        | {"moe/drop_frac_mean": 0.5, "moe/load_max_over_mean_mean": 2.0}
        for loss in (1.0, 2.0)
    ]
    write_report([], rows, tmp_path / "page.md")
    line = "| capacity 1 | 2 | 1.500 ± 0.707 | 0.500 ± 0.000 | 2.000 ± 0.000 |"
    assert line in (tmp_path / "page.md").read_text()


def test_what_is_never_learned_is_told(tmp_path: Path) -> None:
    rows = [
        {"system": "one network", "seed": seed, "lr": 0.1, "error": 0.5, "epochs": epochs}
        for seed, epochs in enumerate([None, 40])
    ]
    write_report(rows, [], tmp_path / "page.md")
    assert (
        "| one network | 2 | 0.1 | 1 of 2 | 0.500 ± 0.000 | 40 |"
        in (tmp_path / "page.md").read_text()
    )


def test_the_likelihood_is_judged_seed_by_seed(tmp_path: Path) -> None:
    def row(system: str, seed: int, epochs: int | None, information: float) -> dict:
        numbers = {"lr": 0.1, "unit": 3.0, "error": 0.1, "epochs": epochs}
        if system != "one network":
            numbers["information"] = information
        return {"system": system, "seed": seed, **numbers}

    rows = [row("likelihood", seed, 10, 1.5) for seed in range(2)]
    rows += [row("cooperative", 0, 20, 1.0), row("cooperative", 1, 5, 1.0)]
    rows += [row("competitive", 0, None, 1.6), row("competitive", 1, None, 1.0)]
    rows += [row("one network", seed, 10, 0.0) for seed in range(2)]
    write_report(rows, [], tmp_path / "page.md")
    assert (
        "against the cooperative loss it is learned sooner in 1 and has more information in 2; "
        "against the competitive loss it is learned sooner in 2 and has more information in 1; "
        "against the network it is learned sooner in 0."
    ) in (tmp_path / "page.md").read_text()


def test_the_best_setting_learns_soonest() -> None:
    rows = [
        {"system": "likelihood", "lr": lr, "unit": 1.0, "epochs": epochs, "error": error}
        for lr, epochs, error in ((0.03, 600, 0.2), (0.1, 90, 0.3), (0.3, 90, 0.1))
    ]
    assert classics_mixtures.best_setting("likelihood", rows).lr == 0.3


@pytest.mark.parametrize(("group", "arm"), [(g, arm) for g, arms in ARMS.items() for arm in arms])
def test_arms_are_configurations(group: str, arm: str) -> None:
    assert arm_config(group, arm, []).model.moe.num_experts == 16
