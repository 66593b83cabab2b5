"""The commands on a model with a continuous space of experts."""

import json
from pathlib import Path

import pytest
import yaml
from command import STEPS, dmoe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def blocks(folder: Path) -> Path:
    """The run of the other tests, with its experts for blocks."""
    override = "model.moe.infinite.granularity=block"
    trained = dmoe("train", folder / "run.yaml", "run.name=blocks", override, "eval.every=2")
    assert trained.status == 0, trained.err
    return folder / "blocks"


@pytest.mark.parametrize("granularity", ["neuron", "block"])
def test_what_is_seen_while_training(folder: Path, granularity) -> None:
    infinite = f"model.moe.infinite={{granularity: {granularity}, active_fraction: 0.25}}"
    told = ("metrics.tensorboard=true", "metrics.moe=detailed", "metrics.log_every=1")
    name = f"seen_{granularity}"
    trained = dmoe("train", folder / "run.yaml", f"run.name={name}", infinite, *told)
    assert trained.status == 0, trained.err
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
    [row] = [row for row in rows if row["step"] == STEPS and "loss" in row]
    events = EventAccumulator(str(folder / name / "tensorboard"))
    events.Reload()
    statistics = {
        "load_entropy": (0, 1),
        "dead_frac": (0, 1),
        "sigma": (0.5, 2),
        "sigma_std": (0, 1),
        "overlap": (0.25, 1),
        "active": (0.25, 0.5),
    }
    for statistic, (low, high) in statistics.items():
        for key in (f"moe/{statistic}_mean", *(f"moe/layer_{i}/{statistic}" for i in range(2))):
            assert low <= row[key] <= high, key
            assert events.Scalars(key)[-1].value == pytest.approx(row[key])


def test_a_row_for_each_number_of_samples(blocks: Path) -> None:
    [own] = dmoe("eval", blocks, "--json").json()
    rows = dmoe("eval", blocks, "--samples", "1,2,8", "--json").json()
    assert [row["samples"] for row in rows] == [1, 2, 8]
    assert rows[1]["eval_loss"] == own["eval_loss"]
    assert len({row["eval_loss"] for row in rows}) == 3
    used = [row["k_mean"] for row in rows]
    assert used[0] == 1 < used[1] < used[2] <= 4
    assert own["k"] is None
    [mean] = dmoe("eval", blocks, "--samples", "mean", "--json").json()
    assert mean["samples"] == "mean"
    assert mean["k_mean"] == 1
    assert mean["eval_loss"] not in [row["eval_loss"] for row in rows]


def test_text_is_generated_from_samples_and_the_same_again(blocks: Path) -> None:
    options = ("--prompt", "one", "--max-new-tokens", 8, "--seed", 3, "--json")
    first = dmoe("generate", blocks, *options).json()
    again = dmoe("generate", blocks, *options).json()
    assert [r["text"] for r in first] == [r["text"] for r in again]
    texts = {
        samples: dmoe("generate", blocks, *options, "--samples", samples).json()[0]["text"]
        for samples in ("1", "2", "mean")
    }
    assert texts["2"] == first[0]["text"]
    assert len(set(texts.values())) == 3


def test_blocks_become_neurons(blocks: Path, tmp_path: Path) -> None:
    path = Path(dmoe("checkpoint", "to-neurons", blocks, tmp_path / "out", "--json").json()["path"])
    assert path.name == f"step_{STEPS:08d}"
    config = yaml.safe_load((path / "config.yaml").read_text())
    infinite = config["model"]["moe"]["infinite"]
    assert (infinite["granularity"], infinite["ffn_dim"]) == ("neuron", 64)
    for samples in ("2", "5"):
        [before], [after] = (
            dmoe("eval", where, "--samples", samples, "--json").json() for where in (blocks, path)
        )
        assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "0"), "samples = 0 is below 1"),
        (("--samples", "few"), "--samples: 'few' is not a list of whole numbers or mean"),
        (("--k", "2"), "k = 2, but the model has a continuous space of experts"),
        (("--threshold", "0.1"), "the router infinite does not choose by score"),
    ],
)
def test_what_a_space_of_experts_has_not_is_refused(blocks: Path, options, message) -> None:
    outcome = dmoe("eval", blocks, *options)
    assert outcome.status == 2
    assert message in outcome.err


def test_text_takes_one_number_of_samples(blocks: Path) -> None:
    outcome = dmoe("generate", blocks, "--prompt", "one", "--samples", "1,2")
    assert outcome.status == 2
    assert "--samples: '1,2' is 2 numbers: give one" in outcome.err


def test_a_mixture_has_no_mean_without_a_rule(folder: Path) -> None:
    mixture = "model.moe.infinite={router: {name: mixture, components: 3}}"
    assert dmoe("train", folder / "run.yaml", "run.name=mixture", mixture).status == 0
    outcome = dmoe("eval", folder / "mixture", "--samples", "1,mean")
    assert outcome.status == 2
    assert "samples = mean takes the mean of z" in outcome.err
    assert "router.components = 3 of them: set router.mean to argmax or average" in outcome.err


def test_samples_and_blocks_take_such_a_model(run: Path, tmp_path: Path) -> None:
    outcome = dmoe("eval", run, "--samples", "2")
    assert outcome.status == 2
    assert "no continuous space of experts" in outcome.err
    outcome = dmoe("checkpoint", "to-neurons", run, tmp_path / "out")
    assert outcome.status == 2
    assert "has no blocks of neurons to convert" in outcome.err
