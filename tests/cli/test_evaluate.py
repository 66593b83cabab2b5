"""`dmoe eval`: a row for each number of experts, the search for a budget, what is compared."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from command import STEPS, Outcome, dmoe

from dmoe.cli import search as searching
from dmoe.cli import trained as loading
from dmoe.evaluation.costs import Costs
from dmoe.models.k_profile import KProfile, load_k_profile
from dmoe.trainer.config import Config


def test_eval_prints_one_row(run: Path, checkpoint: Path) -> None:
    [row] = dmoe("eval", run, "--json").json()
    assert (row["step"], row["k"]) == (STEPS, 2)
    assert 4 < row["eval_loss"] < 7
    assert row["eval_bits_per_byte"] > 0
    assert dmoe("eval", checkpoint, "--json").json() == [row]
    shown = dmoe("eval", run)
    assert shown.status == 0
    assert f"eval_loss={row['eval_loss']}" in shown.out
    [part] = dmoe("eval", run, "--max-batches", 1, "--json").json()
    assert part["num_targets"] < row["num_targets"]


def test_eval_measures_what_training_did(run: Path) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    [row] = dmoe("eval", run, "--json").json()
    assert row["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)


def test_a_row_for_each_k_after_one_load(run: Path) -> None:
    with patch.object(loading, "load_model", wraps=loading.load_model) as load:
        rows = dmoe("eval", run, "--k", "4,1,2", "--json").json()
    assert load.call_count == 1
    assert [row["k"] for row in rows] == [row["k_mean"] for row in rows] == [4, 1, 2]
    assert len({row["eval_loss"] for row in rows}) == 3
    [own] = dmoe("eval", run, "--json").json()
    assert rows[2] == own
    shown = dmoe("eval", run, "--k", "4,1")
    assert [line.split()[:2] for line in shown.out.splitlines()] == [
        [f"step={STEPS}", "k=4"],
        [f"step={STEPS}", "k=1"],
    ]


def test_rows_of_profiles_follow(run: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "uniform.yaml", tmp_path / "front.yaml"]
    paths[0].write_text("k: [1, 1]")
    paths[1].write_text("k: [4, 1]")
    both = ("--profile", paths[0], "--profile", paths[1])
    rows = dmoe("eval", run, "--k", 1, *both, "--json").json()
    assert [row["k"] for row in rows] == [1, [1, 1], [4, 1]]
    assert rows[0]["eval_loss"] == rows[1]["eval_loss"] != rows[2]["eval_loss"]
    assert [row.get("profile") for row in rows] == [None, *map(str, paths)]
    assert rows[2]["k_mean"] == 2.5


def test_a_threshold_reports_what_was_used(run: Path) -> None:
    rows = dmoe("eval", run, "--k", "1,4", "--threshold", 0.9, "--json").json()
    assert [row["gate_threshold"] for row in rows] == [0.9, 0.9]
    assert rows[0]["k_mean"] == 1
    assert 1 < rows[1]["k_mean"] < 4
    assert rows[1]["eval_loss"] != dmoe("eval", run, "--k", 4, "--json").json()[0]["eval_loss"]


def search(run: Path, *options: object) -> dict:
    [row] = dmoe("eval", run, "--calibration-batches", 2, *options, "--json").json()
    return row


def test_a_budget_finds_a_profile_that_others_accept(run: Path) -> None:
    row = search(run, "--budget", 5, "--k-max", 4)
    assert sum(row["k"]) == row["cost"] <= row["budget"] == 5
    assert row["budget_unit"] == "experts"
    assert row["calibration_loss"] <= row["uniform_calibration_loss"]
    assert row["uniform_k"] == 2
    assert row["k_mean"] == sum(row["k"]) / 2

    path = run / "k_profile.yaml"
    assert row["profile"] == str(path)
    profile = _profile(run, path)
    assert list(profile.k) == row["k"]
    assert (profile.budget.size, profile.budget.cost) == (5, row["cost"])
    assert profile.searched_on.step == STEPS
    assert profile.searched_on.loss == row["calibration_loss"]
    assert profile.searched_on.num_targets > 0

    [again] = dmoe("eval", run, "--profile", path, "--json").json()
    assert again["eval_loss"] == row["eval_loss"]
    assert dmoe("generate", run, "--prompt", "x", "--profile", path).status == 0
    assert dmoe("checkpoint", "verify", run).status == 0


def test_the_calibration_text_is_not_the_held_out_one(run: Path, tmp_path: Path) -> None:
    """The held-out loss of one micro-batch differs; that of the sample does not."""
    output = ("--output", tmp_path / "p.yaml")
    one = search(run, "--budget", 3, "--max-batches", 1, *output)
    all_ = search(run, "--budget", 3, *output)
    assert one["calibration_loss"] == all_["calibration_loss"]
    assert one["eval_loss"] != all_["eval_loss"]
    assert _profile(run, tmp_path / "p.yaml").budget.size == 3


def test_a_budget_of_flops_is_that_of_the_experts(run: Path, tmp_path: Path) -> None:
    """Experts cost alike in every layer, so the budgets allow the same profiles."""
    output = ("--output", tmp_path / "p.yaml")
    experts = search(run, "--budget", 3, *output)
    outcome = dmoe("eval", run, "--budget", 1, "--budget-unit", "flops")
    least = float(outcome.err.split(" is below ")[1].split(",")[0])
    flops = search(run, "--budget", least, "--budget-unit", "flops", *output)
    assert flops["k"] == [1, 1]
    an_expert = 2 * 3 * 16 * 16
    unit = ("--budget-unit", "flops")
    flops = search(run, "--budget", least + 1.5 * an_expert, *unit, *output)
    assert flops["k"] == experts["k"]
    assert flops["cost"] == least + (sum(experts["k"]) - 2) * an_expert


def test_a_budget_of_seconds_goes_by_what_was_measured(run: Path, tmp_path: Path) -> None:
    """The second layer is slow: it gets one expert, whatever the loss would like."""
    measured = Costs("latency", 1.0, ((1.0, 2.0), (1.0, 9.0)))
    options = ("--budget", 4.5, "--budget-unit", "latency", "--output", tmp_path / "p.yaml")
    with patch.object(searching, "latency_costs", return_value=measured):
        row = search(run, *options)
    assert row["k"] in ([1, 1], [2, 1])
    assert row["cost"] == 1 + sum(row["k"])
    assert row["uniform_k"] == 1
    assert _profile(run, tmp_path / "p.yaml").budget.unit == "latency"
    too_much = dmoe("eval", run, "--budget", 1e9, "--budget-unit", "latency")
    assert too_much.status == 2
    assert "seconds a pass is above" in too_much.err


def test_comparisons_are_rows_of_their_own(run: Path) -> None:
    options = ("--agreement", "1,4", "--similarity", "--max-batches", 2)
    agreement, similarity = dmoe("eval", run, *options, "--json").json()
    assert agreement["agreement_k"] == [1, 4]
    first, second = agreement["agreement_of_layers"]
    assert first == 1
    assert second < 1
    assert agreement["agreement"] == (first + second) / 2
    assert len(similarity["expert_similarity_of_layers"]) == 2
    mean = sum(similarity["expert_similarity_of_layers"]) / 2
    assert -1 <= similarity["expert_similarity"] == mean <= 1
    rows = dmoe("eval", run, "--k", 1, *options, "--json").json()
    assert ["eval_loss" in row for row in rows] == [True, False, False]
    assert rows[1:] == [agreement, similarity]
    assert "agreement_of_layers=1.0," in dmoe("eval", run, *options).out


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("--k 1,5", ["k = 5", "num_experts = 4"]),
        ("--k 0", ["k = 0", "num_experts = 4"]),
        ("--k 1,,2", ["--k", "'1,,2'", "1,2,4"]),
        ("--profile nowhere.yaml", ["nowhere.yaml"]),
        ("--threshold 1", ["threshold = 1.0", "[0, 1)"]),
        ("--threshold nan", ["[0, 1)"]),
        ("--budget 1", ["1 experts", "below the number of MoE layers", "2 to 4"]),
        ("--budget 5", ["5 experts", "above 4", "--k-max"]),
        ("--budget 2.5", ["2.5 experts", "whole number"]),
        ("--budget nan", ["budget"]),
        ("--budget 3 --k-max 5", ["k = 5", "num_experts = 4"]),
        ("--budget 3 --k-max 0", ["k = 0", "num_experts = 4"]),
        ("--budget 1 --budget-unit flops", ["FLOPs a token", "below"]),
        ("--budget 1e15 --budget-unit flops", ["FLOPs a token", "above", "--k-max"]),
        ("--budget 0 --budget-unit latency", ["seconds", "above 0"]),
        ("--budget 3 --output no/where/p.yaml", ["--output", "no/where"]),
        ("--k-max 2", ["--k-max", "--budget"]),
        ("--agreement 2", ["--agreement", "two numbers"]),
        ("--agreement 1,5", ["k = 5", "num_experts = 4"]),
        ("model.moe.router.top_k=1", ["model.moe.router.top_k", "is 2", "--k"]),
        ("engine.precision=bf16", ["engine.precision", "trained"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(
    options: str, facts: list[str], run: Path
) -> None:
    with patch.object(loading, "load_model", side_effect=AssertionError("loaded")):
        outcome: Outcome = dmoe("eval", run, *options.split(), "--json")
    assert outcome.status == 2
    assert outcome.out == ""
    for fact in facts:
        assert fact in outcome.err


def test_a_profile_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("k: [1, 2, 2]\n")
    outcome = dmoe("eval", run, "--profile", path)
    assert outcome.status == 2
    assert f"{path}: k = [1, 2, 2] has 3 numbers, but the model has 2 MoE layers" in outcome.err


def test_a_dense_model_has_no_k(folder: Path) -> None:
    dense = ("model.moe=null", "run.name=dense", "train.steps=1")
    assert dmoe("train", folder / "run.yaml", *dense).status == 0
    [row] = dmoe("eval", folder / "dense", "--json").json()
    assert (row["k"], row["k_mean"]) == (None, None)
    for options in ("--k 1", "--budget 4", "--threshold 0.5", "--agreement 1,2", "--similarity"):
        outcome = dmoe("eval", folder / "dense", *options.split())
        assert outcome.status == 2, options
        assert "the model is dense" in outcome.err


def test_where_tokens_differ_a_row_has_no_k_unless_it_is_forced(folder: Path) -> None:
    top_p = ("model.moe.router.name=top_p", "run.name=top_p", "train.steps=1")
    assert dmoe("train", folder / "run.yaml", *top_p).status == 0
    [own] = dmoe("eval", folder / "top_p", "--json").json()
    assert own["k"] is None
    assert 1 <= own["k_mean"] <= 4
    [forced] = dmoe("eval", folder / "top_p", "--k", 3, "--json").json()
    assert forced["k"] == forced["k_mean"] == 3
    *_, last = (folder / "top_p" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["k"] is None


def test_a_search_goes_up_to_the_k_of_training(folder: Path) -> None:
    elastic = ("model.moe.elastic.k_max=3", "run.name=elastic", "train.steps=1")
    assert dmoe("train", folder / "run.yaml", *elastic).status == 0
    outcome = dmoe("eval", folder / "elastic", "--budget", 7)
    assert outcome.status == 2
    assert "above 6, the most that 2 MoE layers of at most 3 experts" in outcome.err


def test_a_damaged_config_is_no_mistake_of_the_user(run: Path, checkpoint: Path) -> None:
    path = checkpoint / "config.yaml"
    intact = path.read_text()
    path.write_text(intact.replace("num_heads: 2", "num_heads: two"))
    outcome = dmoe("eval", run)
    path.write_text(intact)
    assert outcome.status == 1
    assert "config.yaml" in outcome.err


def _profile(run: Path, path: Path) -> KProfile:
    config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    return load_k_profile(path, config.model)
