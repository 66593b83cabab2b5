"""The experiment on classical mixtures, at a size that takes seconds."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmoe.data import prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "experiments"))
import classics
import classics_claims
import classics_mixtures
import experiment_page
from classics_arms import ARMS, FACTORS, PLAIN, arm_config
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
    assert "| Without either loss the load is very uneven" in page.read_text()
    assert "| stdlib | `builtin:stdlib`: " in page.read_text()


def test_the_report_has_mean_and_spread(tmp_path: Path) -> None:
    rows = [
        {"group": "top-1", "arm": "capacity 1", "seed": seed, "steps": 2, "tokens": 10}
        | {"loss": loss, "moe/drop_frac_mean": 0.5, "moe/load_max_over_mean_mean": 2.0}
        for seed, loss in enumerate([1.0, 2.0])
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


def _verdicts(claims: list[experiment_page.Claim]) -> dict[str, str]:
    return {claim.words: claim.verdict for claim in claims}


def test_claims_on_importance_and_load_by_hand() -> None:
    """With no loss all is uneven and perplexity worst in seed 0; in seed 1 that is best."""
    even = dict(zip(ARMS["importance and load"], (9, 1.5, 1.4, 1.3, 1.35, 1.2), strict=True))
    rows = [
        {"arm": arm, "seed": seed, "loss": 1 + load * (1 - 2 * seed)}
        | {"moe/importance_loss": load, "moe/load_loss": load, "moe/load_max_over_mean_mean": load}
        for arm, load in even.items()
        for seed in (0, 1)
    ]
    verdicts = list(_verdicts(classics_claims.of_importance_and_load(rows)).values())
    assert verdicts[:6] == ["holds in all 2"] * 6
    assert verdicts[6:] == ["holds in 1 of 2"] * 2
    rows = [row for row in rows if row["arm"] != "0, 0"]
    verdicts = list(_verdicts(classics_claims.of_importance_and_load(rows)).values())
    assert verdicts[0] == verdicts[1] == verdicts[-1] == "not measured"
    assert verdicts[4] == "holds in all 2", "it needs no run without losses"


def test_claims_on_capacity_by_hand() -> None:
    rows = [
        {"arm": f"capacity {factor:g}", "seed": seed, "moe/drop_frac_mean": 1 / factor}
        | {"loss": 9.0 if (seed, factor) == (1, 0.75) else 4 - factor}
        for factor in FACTORS
        for seed in (0, 1)
    ]
    rows += [{"arm": PLAIN, "seed": seed, "loss": 3.0} for seed in (0, 1)]
    verdicts = _verdicts(classics_claims.of_capacity(rows))
    assert verdicts[
        "Fewer tokens are dropped with each larger factor, 0.5, 0.75, 1, 1.25 and 2"
    ] == ("holds in all 2")
    assert verdicts["The loss improves with each larger factor"] == "holds in 1 of 2"
    assert verdicts["Factor 0.75 is better than 0.5"] == "holds in 1 of 2"
    assert verdicts["Factor 2 is better than 0.5"] == "holds in all 2"
    assert verdicts["Dropping nothing is better than factor 2"] == "does not hold in any of 2"


def test_claims_on_precision_and_scale_by_hand() -> None:
    losses = {
        PLAIN: (2.0, 2.2),
        "router in bfloat16": (1.9, 2.5),
        "initial scale 1": (1.0, 1.1),
        "initial scale 0.1": (1.5, 1.5),
    }
    rows = [
        {"arm": arm, "seed": seed, "loss": loss, "early_loss": 2 * loss - 0.2}
        for arm, pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    claims = classics_claims.of_precision(rows)
    assert [claim.verdict for claim in claims] == [
        "does not hold in any of 2",
        "holds in 1 of 2",
        "holds",
        "holds in 1 of 2",
    ]
    assert claims[-1].numbers == "0.1000 ± 0.2828 against 0.1414", "0.1 is less, 0.3 is not"
    early = [claim.verdict for claim in classics_claims.of_scale(rows)][:3]
    assert early == ["does not hold in any of 2", "holds in all 2", "holds"]
    alone = classics_claims.of_scale([row for row in rows if row["seed"] == 0])
    assert alone[2].verdict == "not measured", "one seed has no spread"


def test_the_best_setting_learns_soonest() -> None:
    rows = [
        {"system": "likelihood", "lr": lr, "unit": 1.0, "epochs": epochs, "error": error}
        for lr, epochs, error in ((0.03, 600, 0.2), (0.1, 90, 0.3), (0.3, 90, 0.1))
    ]
    assert classics_mixtures.best_setting("likelihood", rows).lr == 0.3


@pytest.mark.parametrize(("group", "arm"), [(g, arm) for g, arms in ARMS.items() for arm in arms])
def test_arms_are_configurations(group: str, arm: str) -> None:
    assert arm_config(group, arm, []).model.moe.num_experts == 16
