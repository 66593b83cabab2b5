"""What a run leaves behind: metrics.jsonl, TensorBoard, status.json, config.yaml."""

import json
import math
from pathlib import Path
from typing import Any

import poison
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import InterruptedTrainingError, Watch, tiny_config

from dmoe.config import load_config
from dmoe.engine import StepResult
from dmoe.metrics.jsonl import read_metrics
from dmoe.metrics.names import tensorboard_scalars
from dmoe.models.counts import flops_per_token
from dmoe.moe import MoEConfig
from dmoe.train import measure
from dmoe.trainer import callbacks
from dmoe.trainer.build import open_run
from dmoe.trainer.callbacks import Evaluate, LogMetrics, SaveCheckpoints, TellStatus
from dmoe.trainer.config import Config
from dmoe.trainer.loop import Callback, Trainer
from dmoe.trainer.step import StepRecord

CPU = torch.device("cpu")
TRAINING_KEYS = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "skipped"}
SKIPPED_STEP = 3


class PoisonOneStep(Callback):
    """Makes the loss of one step NaN."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.progress.step == SKIPPED_STEP - 1:
            self.bad = poison.loss(trainer.engine)
            self.bad.__enter__()
        elif trainer.progress.step == SKIPPED_STEP:
            self.bad.__exit__(None, None, None)


def run_config(store: Path, folder: Path, k: tuple[int, ...] = (), **metrics: Any) -> Config:
    common = {"log_every": 1, "heatmap_every": 3, "peak_flops": 1e12, "tensorboard": True}
    evaluation = {"every": 3, "max_batches": 1, "k": k}
    return tiny_config(store, folder, metrics={**common, **metrics}, eval=evaluation)


def train(config: Config, *others: Callback) -> None:
    """Train with everything that `dmoe.train` attaches, and `others` last."""
    with open_run(config, CPU) as run:
        callbacks = [
            TellStatus(run.journal),
            LogMetrics(config, run.journal, device=CPU, world_size=1),
            Evaluate(config, run.journal, lambda max_batches: measure(run, max_batches)),
            SaveCheckpoints(),
        ]
        run.trainer.fit([*callbacks, *others])


def die(config: Config, after: int) -> None:
    with pytest.raises(InterruptedTrainingError):
        train(config, Watch(die_after=after))


def status(config: Config) -> dict[str, Any]:
    return json.loads((config.run.folder / "status.json").read_text())


def rows(config: Config) -> list[dict[str, Any]]:
    return read_metrics(config.run.folder / "metrics.jsonl")


def events(config: Config) -> EventAccumulator:
    accumulator = EventAccumulator(str(config.run.folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    clocks = ("tokens_per_second", "step_seconds", "data_seconds", "mfu_active", "memory_gib")
    return {key: value for key, value in row.items() if key not in clocks}


def test_levels_of_experts_have_biases_and_losses_of_their_own(
    token_store: Path, tmp_path: Path
) -> None:
    router = {"name": "top_k", "top_k": 2, "bias_update_rate": 0.01}
    inside = {"num_experts": 6, "expert_ffn_dim": 16, "router": router}
    moe = {"num_experts": 4, "num_dense_layers": 1, "router": router, "expert_layer": inside}
    tree = run_config(token_store, tmp_path).model_dump()
    tree["model"]["moe"] = moe
    train(Config.model_validate(tree))
    row = [row for row in rows(Config.model_validate(tree)) if "loss" in row][-1]
    assert 0 < row["moe/bias_absmax_max"] <= 0.06
    assert row["moe/k_mean_mean"] == pytest.approx(2)
    assert row["moe/within_load_balance_loss"] > row["aux_loss"] > 0
    assert 0 < row["moe/within_entropy_mean"] < 1
    assert 1 <= row["moe/within_load_max_over_mean_mean"] <= 6
    assert 0 <= row["moe/within_dead_frac_mean"] < 1
    assert row["moe/within_drop_frac_mean"] == 0
    assert not any("slots" in key or "rows" in key for key in row)


def test_statistics_of_three_levels_by_hand() -> None:
    """One layer of two, each of one layer of two experts: 4 and 2 tokens, of 6, came to them."""
    leaf = {"num_experts": 2, "expert_ffn_dim": 8, "router": {"name": "top_k", "top_k": 1}}
    middle = {"num_experts": 1, "router": {"name": "top_k", "top_k": 1}, "expert_layer": leaf}
    moe = MoEConfig.model_validate({"num_experts": 2, "expert_layer": middle})
    slots = torch.tensor([[4, 3, 1, 2, 0, 2]]) / 6
    vectors = {
        "within_slots": slots,
        "within_rows": torch.tensor([[4, 2]]) / 6,
        "within_within_rows": torch.tensor([[4, 2]]) / 6,
    }
    means = {
        "entropy": torch.tensor([0.5]),
        "within_entropy": torch.tensor([0.25]),
        "within_within_entropy": torch.tensor([0.75]),
        "within_dropped": torch.tensor([0.0]),
        "within_within_dropped": torch.tensor([1 / 6]),
    }
    result = StepResult(0.0, {}, torch.tensor([[4, 2]]), torch.zeros(1), means, vectors, 6)
    told = {name: value.item() for name, value in callbacks._means(result, moe).items()}
    assert told == pytest.approx(
        {
            "entropy": 0.5,
            "within_entropy": 0.25,
            "within_load_max_over_mean": 1,
            "within_dead_frac": 0,
            "within_drop_frac": 0,
            "within_within_entropy": 0.75,
            "within_within_load_max_over_mean": 2,
            "within_within_dead_frac": 1 / 4,
            "within_within_drop_frac": 1 / 6,
        }
    )


def test_rows_and_curves_of_a_run_with_a_skipped_step(token_store: Path, tmp_path: Path) -> None:
    config = run_config(token_store, tmp_path, moe="detailed")
    train(config, PoisonOneStep())
    training = [row for row in rows(config) if "loss" in row]
    evaluations = [row for row in rows(config) if "eval_loss" in row]

    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    for row in training:
        assert row.keys() >= TRAINING_KEYS
        assert row.keys() >= {"aux_loss", "moe/load_cv_mean", "moe/layer_1/entropy", "mfu_active"}
        assert row["moe/bias_absmax_max"] <= 0.06
    assert [row["skipped"] for row in training] == [0, 0, 1, 1, 1, 1]
    assert training[2]["loss"] is None
    assert {"loss", "grad_norm"} <= set(training[2]["non_finite"])
    assert training[3]["lr"] == training[2]["lr"]
    assert all(math.isfinite(row["loss"]) for row in training if row["step"] != SKIPPED_STEP)

    assert [row["step"] for row in evaluations] == [3, 6]
    assert all(
        row.keys() == {"step", "eval_loss", "eval_bits_per_byte", "k"} for row in evaluations
    )

    seen = events(config)
    for row in [training[-1], evaluations[-1]]:
        for name, value in tensorboard_scalars({**row, "k": None}).items():
            last = seen.Scalars(name)[-1]
            assert (last.step, last.value) == (row["step"], pytest.approx(value, rel=1e-5))
    skipped = {event.step: event.value for event in seen.Scalars("train/skipped")}
    assert skipped == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    assert [image.step for image in seen.Images("moe/load")] == [3, 6]


def test_rows_tell_the_experts_that_tokens_really_had(token_store: Path, tmp_path: Path) -> None:
    """Of an elastic run with a capacity: slots asked for, and utilisation by those served."""
    config = run_config(token_store, tmp_path, moe="detailed", log_every=2, tensorboard=False)
    tree = config.model_dump(mode="json")
    tree["model"]["moe"] |= {"num_dense_layers": 0, "capacity": {"factor": 0.8}}
    tree["model"]["moe"]["elastic"] = {"k_max": 4, "budget": 5}
    config = Config.model_validate(tree)
    seen = []

    class Look(Callback):
        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            seen.append(record.result)

    train(config, Look())
    training = [row for row in rows(config) if "loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6]
    for row in training:
        window = seen[row["step"] - 2 : row["step"]]
        assert row["k_sum"] == pytest.approx(5)
        assert row["moe/layer_0/k_mean"] + row["moe/layer_1/k_mean"] == pytest.approx(5)
        assert row["moe/layer_0/k_mean"] == window[1].counts_LE[0].sum() / window[1].num_tokens
        dropped = sum(int(result.dropped_L.sum()) for result in window)
        num_tokens = sum(result.num_tokens for result in window)
        assert dropped > 0
        served_k = 5 / 2 - dropped / num_tokens / 2
        flops = flops_per_token(config.model, config.train.seq_len, k=served_k)
        assert row["mfu_active"] == pytest.approx(row["tokens_per_second"] * flops / 1e12, rel=1e-6)


def test_evaluations_at_several_k_are_rows_and_curves(token_store: Path, tmp_path: Path) -> None:
    """The first one is what the checkpoint goes by; training is as without them."""
    config = run_config(token_store, tmp_path / "several", k=(4, 2, 1))
    train(config)
    evaluations = [row for row in rows(config) if "eval_loss" in row]
    assert [(row["step"], row["k"]) for row in evaluations] == [
        (step, k) for step in (3, 6) for k in (4, 2, 1)
    ]
    assert len({row["eval_loss"] for row in evaluations}) == 6
    seen = events(config)
    for row in evaluations[3:]:
        last = seen.Scalars(f"eval/loss_k{row['k']}")[-1]
        assert (last.step, last.value) == (6, pytest.approx(row["eval_loss"], rel=1e-5))
    assert "eval/loss" not in seen.Tags()["scalars"]
    with open_run(config, CPU) as run:
        assert run.trainer.progress.eval_loss == evaluations[3]["eval_loss"]

    own = run_config(token_store, tmp_path / "own")
    train(own)
    [*_, last] = [row for row in rows(own) if "eval_loss" in row]
    assert last == evaluations[4], "the router's own is 2"
    losses = [[row["loss"] for row in rows(c) if "loss" in row] for c in (config, own)]
    assert losses[0] == losses[1]


def test_a_resumed_run_records_what_a_straight_one_does(token_store: Path, tmp_path: Path) -> None:
    straight = run_config(token_store, tmp_path / "straight")
    train(straight)
    resumed = run_config(token_store, tmp_path / "resumed")
    die(resumed, after=2)  # before the first checkpoint: all is done again
    die(resumed, after=5)
    train(resumed)
    assert [*map(without_times, rows(resumed))] == [*map(without_times, rows(straight))]
    curves = [
        [(event.step, event.value) for event in events(config).Scalars("train/loss")]
        for config in (straight, resumed)
    ]
    assert [step for step, _ in curves[1]] == [1, 2, 3, 4, 5, 6]
    assert curves[0] == curves[1]


def test_rows_come_as_often_as_asked_and_at_the_end(token_store: Path, tmp_path: Path) -> None:
    config = run_config(token_store, tmp_path, log_every=4, tensorboard=False)
    train(config)
    assert [row["step"] for row in rows(config) if "loss" in row] == [4, 6]
    assert not (config.run.folder / "tensorboard").exists()


def test_status_tells_running_failed_and_finished(token_store: Path, tmp_path: Path) -> None:
    config = run_config(token_store, tmp_path, tensorboard=False)
    seen: list[tuple[str, int]] = []

    class Look(Callback):
        def on_start(self, trainer: Trainer) -> None:
            self.look()

        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            self.look()

        def look(self) -> None:
            now = status(config)
            seen.append((now["state"], now["step"]))

    with pytest.raises(InterruptedTrainingError):
        train(config, Look(), Watch(die_after=2))
    assert seen == [("running", 0), ("running", 1), ("running", 2)]
    failed = status(config)
    assert (failed["state"], failed["step"]) == ("failed", 2)
    assert "InterruptedTrainingError" in failed["error"]
    train(config)
    assert (status(config)["state"], status(config)["step"]) == ("finished", 6)
    assert "error" not in status(config)


def test_the_saved_config_is_the_one_of_the_run(token_store: Path, tmp_path: Path) -> None:
    config = run_config(token_store, tmp_path)
    with open_run(config, CPU):
        pass
    assert load_config(config.run.folder / "config.yaml") == config


def test_the_last_checkpoint_knows_its_held_out_loss(token_store: Path, tmp_path: Path) -> None:
    config = run_config(token_store, tmp_path, tensorboard=False)
    train(config)
    last = [row for row in rows(config) if "eval_loss" in row][-1]
    with open_run(config, CPU) as run:
        assert run.trainer.progress.eval_loss == last["eval_loss"]
        assert run.trainer.checkpoints.best() is not None
