"""The Matryoshka experiment, on a model and a text that take seconds."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmoe.config import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "experiments"))
import matryoshka
from matryoshka_arms import ARMS, K_MAX, SPECIALISTS, SWEEP, TRAINED_K, arm_config, ramp, steps_of
from matryoshka_claims import judge
from matryoshka_report import write_report
from matryoshka_results import Text

TINY = [
    "model.dim=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.max_seq_len=32",
    "model.moe.num_experts=8",
    "model.moe.expert_ffn_dim=8",
    "train.seq_len=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "optim.schedule.warmup_steps=1",
    "metrics.log_every=1",
]


def words(number: int) -> str:
    """Return a paragraph."""
    return " ".join(f"{number * i % 97} experts" for i in range(1, 12))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run of `train`: two arms and two seeds, on a text of ours."""
    folder = tmp_path_factory.mktemp("matryoshka")
    text = folder / "words.txt"
    text.write_text("\n\n".join(map(words, range(1, 60))))
    assert start(folder, text).exit_code == 0
    return folder / "out"


def start(folder: Path, text: Path, *more: str):
    """Call `train`."""
    options = ["--arms", "k6,layer", "--seeds", "0,1", "--match", "tokens", "--eval-tokens", "256"]
    where = ["train", "--out", str(folder / "out"), "--data", str(text), "--title", "Words"]
    return CliRunner().invoke(matryoshka.app, [*where, *options, "--steps", "3", *more, *TINY])


def numbers(loss: float) -> dict[str, float]:
    """Return a loss for each k that falls with k."""
    return {str(k): loss - 0.01 * k for k in SWEEP}


def test_runs_are_measured_at_every_k(out: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted(out.glob("words/results/*.json"))]
    assert [(r["plan"]["arm"], r["plan"]["seed"]) for r in results] == [
        ("k6", 0),
        ("k6", 1),
        ("layer", 0),
        ("layer", 1),
    ]
    for result in results:
        assert list(result["loss"]) == [str(k) for k in SWEEP]
        # A router of random weights chooses; so another k is another function.
        assert len(set(result["loss"].values())) == len(SWEEP)
        assert result["agreement_L"][0] == pytest.approx(1)
        assert ("search" in result) == (result["plan"]["arm"] == "layer")
    assert results[0]["loss"] != results[1]["loss"]
    assert results[0]["k_mean_in_training"] == 6
    assert 1 <= results[2]["k_mean_in_training"] < 6


def test_the_search_stays_within_its_sums(out: Path) -> None:
    result = json.loads((out / "words/results/layer-tokens-seed0.json").read_text())
    assert [row["sum"] for row in result["search"]] == [6, 8, 12]  # of two layers
    for row in result["search"]:
        assert sum(row["profiles"]["found"]) <= row["sum"]
        for kind in ("front", "back", "uniform"):
            assert sum(row["profiles"][kind]) == row["sum"]
        assert row["loss"].keys() == row["profiles"].keys()
        # The uniform profile is a point of the sweep.
        k = str(row["sum"] // 2)
        assert row["loss"]["uniform"] == pytest.approx(result["loss"][k], rel=1e-6)


def test_a_result_is_neither_made_twice_nor_mixed_with_others(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("words/results/*")}
    folder, text = out.parent, out.parent / "words.txt"
    assert start(folder, text).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("words/results/*")} == before
    refused = start(folder, text, "--eval-tokens", "512").exception
    assert isinstance(refused, ConfigError)
    assert "eval_tokens = 256, and now it is 512" in str(refused)


def test_the_report_is_written_from_the_results(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_report(out, page)
    written = page.read_text()
    assert "## Words" in written
    assert page.with_suffix(".svg").read_text().count("experts a token, k") == 2
    text = Text(out / "words")
    row = next(line for line in written.splitlines() if line.startswith("| Matryoshka, layer |"))
    losses = [text.loss("layer", 3, seed) for seed in (0, 1)]
    assert f"{sum(losses) / 2:.4f} ± " in row
    # Without the other specialists there is nothing to be near to.
    assert "The worst gap of the layer-wise model is smaller" in written
    assert written.count("not measured") > 5


def test_claims_are_judged_by_seed(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "text.json").write_text("{}")
    # In seed 0 the layer-wise model is 0.01 from each specialist; in seed 1 it is far away.
    for seed, layer in ((0, 1.01), (1, 1.5)):
        for arm in ("k1", "k1_plain", "k2", "k4", "k6", "layer"):
            loss = numbers(layer if arm == "layer" else 1.0)
            if arm == "k6":
                loss["1"] += 0.3
            plan = {"arm": arm, "match": "tokens", "seed": seed}
            run = {"plan": plan, "loss": loss, "training_flops": 1.0, "tokens": 1}
            path = tmp_path / "results" / f"{arm}{seed}.json"
            path.write_text(json.dumps(run))
    text = Text(tmp_path)
    assert text.worst_gap("layer", 0) == pytest.approx(0.01)
    assert text.worst_gap("k6", 0) == pytest.approx(0.3)
    held = {claim.words: claim for claim in judge(text)}
    near = "The worst gap of the layer-wise model is smaller than that of the k = 6 specialist"
    assert held[near].held == [True, False]
    assert held[near].verdict == "holds in 1 of 2"
    assert held[near].numbers == "0.2550 ± 0.3465 against 0.3000 ± 0.0000"
    better = "At k = 6 the k = 6 specialist is better than the layer-wise model"
    assert held[better].verdict == "holds in all 2"


def test_the_better_specialist_counts(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "text.json").write_text("{}")
    for arm, loss in (("k1", 2.0), ("k1_plain", 1.5), ("layer", 1.75)):
        plan = {"arm": arm, "match": "tokens", "seed": 0}
        run = {"plan": plan, "loss": numbers(loss), "training_flops": 1.0, "tokens": 1}
        (tmp_path / "results" / f"{arm}.json").write_text(json.dumps(run))
    assert Text(tmp_path).gap("layer", 1, 0) == pytest.approx(0.25)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_config(arm: str) -> None:
    moe = arm_config(arm).model.moe
    assert moe.num_experts >= max(SWEEP)
    if moe.elastic is not None:
        assert (moe.elastic.k_min, moe.elastic.k_max) == (1, K_MAX)


def test_specialists_train_at_their_k() -> None:
    for k in TRAINED_K:
        for arm in SPECIALISTS[k]:
            assert arm_config(arm).model.moe.router.top_k == k


def test_steps_at_equal_flops() -> None:
    config = arm_config("layer")
    model, experts = config.model, config.model.moe
    # Matrices of a token: attention, router, k experts of three matrices; then the output.
    dim, ffn = model.dim, experts.expert_ffn_dim
    attention = 4 * dim * dim + 2 * dim * config.train.seq_len
    shared = model.num_layers * (attention + dim * experts.num_experts) + dim * model.vocab_size

    def flops(k: float) -> float:
        return 6 * (shared + model.num_layers * k * 3 * dim * ffn)

    assert steps_of("k1", 100, "tokens") == 100
    for arm, k in (("k1", 1), ("k2", 2), ("k4", 4), ("k6", 6), ("anchored", 0.8 * 6 + 0.2 * 3)):
        assert steps_of(arm, 1000, "flops") == round(1000 * flops(3.5) / flops(k)), arm
    for arm in ("layer", "global", "micro", "top_p"):
        assert steps_of(arm, 1000, "flops") == 1000
    assert steps_of("k6", 1000, "flops") < steps_of("weighted", 1000, "flops") < 1000


@pytest.mark.parametrize(
    ("total", "front"),
    [
        (4, (1, 1, 1, 1)),
        (6, (2, 2, 1, 1)),
        (8, (3, 2, 2, 1)),
        (12, (5, 4, 2, 1)),
        (16, (6, 5, 3, 2)),
        (20, (6, 6, 5, 3)),
        (24, (6, 6, 6, 6)),
    ],
)
def test_loaded_profiles(total: int, front: tuple[int, ...]) -> None:
    assert ramp(total, 4, front=True) == front
    assert ramp(total, 4, front=False) == front[::-1]


@pytest.mark.parametrize("total", [3, 25])
def test_no_profile_has_such_a_sum(total: int) -> None:
    with pytest.raises(ValueError, match=f"4 layers of 1 to 6 experts cannot have {total}"):
        ramp(total, 4, front=True)


def test_unknown_arms_are_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(
        matryoshka.app, ["train", "--out", str(tmp_path), "--arms", "k6,k7"]
    )
    assert "'k7' is none of k1, k1_plain" in str(refused.exception)
