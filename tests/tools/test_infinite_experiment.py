"""The infinity-MoE experiment, on a model and a text that take seconds."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmoe.config import ConfigError
from dmoe.models.counts import num_active_params, num_params

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "experiments"))
import infinite
from infinite_arms import ARMS, SAMPLES, SWEEP_ARMS, arm_config, arms_of
from infinite_claims import of_ours, of_paper
from infinite_report import write_report
from infinite_results import Text

TINY = [
    "model.dim=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.max_seq_len=32",
    "train.seq_len=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "optim.schedule.warmup_steps=1",
    "metrics.log_every=1",
]


def words(number: int) -> str:
    """Return a paragraph."""
    return " ".join(f"{number * i % 97} samples" for i in range(1, 12))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run of `train`: some arms, two seeds of those compared."""
    folder = tmp_path_factory.mktemp("infinite")
    text = folder / "words.txt"
    text.write_text("\n\n".join(map(words, range(1, 60))))
    assert start(folder, text).exit_code == 0
    return folder / "out"


def start(folder: Path, text: Path, *more: str):
    """Call `train`."""
    options = ["--arms", "dense_active,top2,neuron,dim4", "--seeds", "0,1", "--eval-tokens", "256"]
    where = ["train", "--out", str(folder / "out"), "--data", str(text), "--title", "Words"]
    return CliRunner().invoke(infinite.app, [*where, *options, "--steps", "3", *more, *TINY])


def result(out: Path, name: str) -> dict:
    return json.loads((out / f"words/results/{name}.json").read_text())


def test_runs_are_measured_at_every_number(out: Path) -> None:
    names = sorted(path.stem for path in out.glob("words/results/*.json"))
    both = [f"{arm}-seed{seed}" for arm in ("dense_active", "neuron", "top2") for seed in (0, 1)]
    assert names == sorted([*both, "dim4-seed0"])
    assert result(out, "dense_active-seed0")["at"] == {}
    assert list(result(out, "top2-seed0")["at"]) == ["1", "2", "3", "4"]
    assert list(result(out, "dim4-seed0")["at"]) == ["2", "mean"]
    neuron = result(out, "neuron-seed0")["at"]
    assert list(neuron) == [str(number) for number in SAMPLES]
    assert len({use["loss"] for use in neuron.values()}) == len(SAMPLES)
    for number, use in neuron.items():
        masks = 1 if number == "mean" else int(number)
        assert use["k_mean_L"] == pytest.approx([masks * 184] * 2)
        active = use["means_L"]["active"]
        assert all(0.25 <= share <= min(1, 0.25 * masks) + 1e-6 for share in active)


def test_statistics_of_training_are_kept(out: Path) -> None:
    curves = result(out, "neuron-seed1")["curves"]
    assert [point["step"] for point in curves] == [1, 2, 3]
    for point in curves:
        assert len(point["load_entropy_L"]) == 2
        assert all(0 < entropy <= 1 for entropy in point["load_entropy_L"])
        assert {"dead_frac_L", "sigma_L", "sigma_std_L", "overlap_L", "active_L"} <= point.keys()


def test_a_result_is_neither_made_twice_nor_mixed_with_others(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("words/results/*")}
    folder, text = out.parent, out.parent / "words.txt"
    assert start(folder, text).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("words/results/*")} == before
    refused = start(folder, text, "--eval-tokens", "512").exception
    assert isinstance(refused, ConfigError)
    assert "eval_tokens = 256, and now it is 512" in str(refused)


def test_the_report_is_written_from_the_results(out: Path, tmp_path: Path) -> None:
    speeds = {arm: [1e3, 2e3, 4e3] for arm in ("top2", "neuron")}
    about = {"tokens": 1000, "settings": "1 threads", "machine": "a CPU", "date": "today"}
    (out / "speed.json").write_text(json.dumps({"ms": speeds, **about}))
    page = tmp_path / "page.md"
    write_report(out, page)
    written = page.read_text()
    assert "## Words" in written
    assert "samples, or experts, at inference" in page.with_suffix(".svg").read_text()
    losses = [result(out, f"neuron-seed{seed}")["loss"] for seed in (0, 1)]
    row = next(line for line in written.splitlines() if line.startswith("| infinity-MoE, neuron |"))
    assert f"| 2 | {sum(losses) / 2:.4f} ± " in row
    # Without the other arms there is nothing to compare with.
    assert written.count("not measured") > 5
    assert "| infinity-MoE, neuron | 2000 | 500 | 1.00 |" in written


def run(arm: str, seed: int, loss: float, entropy: float = 0.95) -> dict:
    """Return a result whose loss falls with the number of samples or experts."""
    steps = (10, 100, 150, 200, 250, 300, 400)
    curves = [{"step": step, "load_entropy_L": [entropy, 0.99]} for step in steps]
    curves[0]["load_entropy_L"] = [0.5, 0.5]
    at = {str(number): {"loss": loss - 0.01 * number} for number in (1, 2, 4, 8)}
    at["mean"] = {"loss": loss}
    return {"plan": {"arm": arm, "seed": seed}, "loss": loss, "at": at, "curves": curves}


def test_claims_are_judged_by_seed(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "text.json").write_text("{}")
    runs = [run("neuron", 0, 1.0), run("neuron", 1, 2.0, entropy=0.8)]
    runs += [run("top2", seed, 1.5) for seed in (0, 1)]
    for one in runs:
        path = tmp_path / "results" / f"{one['plan']['arm']}{one['plan']['seed']}.json"
        path.write_text(json.dumps(one))
    text = Text(tmp_path)
    held = {claim.words: claim for claim in [*of_paper(text), *of_ours(text)]}
    better = held["Neuron is better than top-2 of 4"]
    assert (better.held, better.verdict) == ([True, False], "holds in 1 of 2")
    assert better.numbers == "1.5000 ± 0.7071 against 1.5000 ± 0.0000"
    assert held["At 8 samples neuron is better than at 4"].verdict == "holds in all 2"
    assert held["Neuron is better than Switch"].verdict == "not measured"
    high = held["It is above 0.9 at the end, in every layer"]
    assert high.held == [True, False]
    [stable] = [claim for words, claim in held.items() if words.startswith("The entropy")]
    # What it was before a quarter of the training does not count.
    assert stable.verdict == "holds in all 2"


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_config(arm: str) -> None:
    moe = arm_config(arm).model.moe
    assert (moe is None) == arm.startswith("dense")
    if moe is not None and moe.infinite is not None:
        assert (moe.infinite.samples, moe.infinite.active_fraction) == (2, 0.25)


def test_arms_have_equal_parameters() -> None:
    configs = {arm: arm_config(arm).model for arm in arms_of("compared")}
    total = {arm: num_params(config) for arm, config in configs.items()}
    active = {arm: num_active_params(config) for arm, config in configs.items()}
    for arm in configs:
        if arm != "dense_active":
            assert total[arm] == pytest.approx(total["neuron"], rel=0.005)
        if arm != "dense_total":
            assert active[arm] == pytest.approx(active["neuron"], rel=0.05)
    for arm in arms_of("deep"):
        assert num_params(arm_config(arm).model) == pytest.approx(total["neuron"], rel=0.015)


def test_the_sweep_changes_the_latent_space_alone() -> None:
    for dim, arm in SWEEP_ARMS.items():
        infinite = arm_config(arm).model.moe.infinite
        assert infinite.latent_dim == dim
        changed = infinite.model_copy(update={"latent_dim": 16})
        assert changed == arm_config("neuron").model.moe.infinite


def test_unknown_arms_are_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(infinite.app, ["train", "--out", str(tmp_path), "--arms", "nuron"])
    assert "'nuron' is none of dense_active" in str(refused.exception)
