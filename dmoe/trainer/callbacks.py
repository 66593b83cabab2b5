"""What happens beside the steps: metrics, evaluation, checkpoints, status."""

import math
import resource
from collections.abc import Callable
from typing import Any, Protocol

import torch

from dmoe.engine import StepResult
from dmoe.metrics import moe_rows, peak_flops, statistics_within
from dmoe.models.counts import flops_per_token
from dmoe.moe import MoEConfig
from dmoe.trainer.config import Config
from dmoe.trainer.journal import Journal
from dmoe.trainer.loop import Callback, Trainer
from dmoe.trainer.step import StepRecord


class LogMetrics(Callback):
    """Writes a row every `metrics.log_every` steps and at the last one."""

    def __init__(self, config: Config, journal: Journal, *, device: torch.device, world_size: int):
        self.config, self.journal = config, journal
        model, seq_len = config.model, config.train.seq_len
        self.flops_without_experts = flops_per_token(model, seq_len, k=0)
        self.flops_per_expert = flops_per_token(model, seq_len, k=1) - self.flops_without_experts
        self.window = _Slots()
        self.peak = config.metrics.peak_flops or _known_peak(config, device)
        self.world_size = world_size

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write the row, and now and then the image of the experts' load."""
        step = trainer.progress.step
        self.window.add(record.result)
        if trainer.due(self.config.metrics.log_every):
            self.journal.row(self._row(trainer, record))
        heatmap_every = self.config.metrics.heatmap_every
        if heatmap_every and self.config.model.moe and trainer.due(heatmap_every):
            self.journal.heatmap(step, record.result.counts_LE)

    def _row(self, trainer: Trainer, record: StepRecord) -> dict[str, Any]:
        result, progress = record.result, trainer.progress
        window = trainer.throughput.lap()
        row: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "ppl": _exp(result.loss),
            "lr": record.lr,
            "grad_norm": record.grad_norm,
            "skipped": progress.skipped,
            "tokens_per_second": window.tokens_per_second,
            "step_seconds": window.step_seconds,
            "data_seconds": window.data_seconds,
            "memory_gib": _peak_memory() / 2**30,
        }
        if self.peak:
            flops = self.flops_without_experts + self.flops_per_expert * self.window.mean_k
            row["mfu_active"] = window.mfu(flops, self.peak * self.world_size)
        self.window = _Slots()
        if self.config.model.moe is None:
            return row
        row |= {
            _AUX_KEYS.get(name, f"moe/{name}_loss"): value
            for name, value in result.aux_losses.items()
        }
        biases = [_biases(layer) for layer in trainer.engine.model.moe_layers]
        detailed = self.config.metrics.moe == "detailed"
        return row | moe_rows(
            result.counts_LE,
            result.dropped_L,
            _means(result, self.config.model.moe),
            num_tokens=result.num_tokens,
            biases=biases if all(map(len, biases)) else (),
            layer_ids=self.config.model.moe_layers if detailed else (),
        )


class HeldOut(Protocol):
    """A measurement on the held-out split."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        ...

    @property
    def bits_per_byte(self) -> float | None:
        """The same in bits a byte; None where the split does not know its text."""
        ...


class Evaluate(Callback):
    """Measures the held-out loss every `eval.every` steps and at the last one, at each `eval.k`.

    Args:
        config: of the run.
        journal: where the rows go.
        measure: evaluates at most so many micro-batches, all if None; called on every rank.
    """

    def __init__(self, config: Config, journal: Journal, measure: Callable[[int | None], HeldOut]):
        self.config, self.journal, self.measure = config, journal, measure

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Measure, write a row each, and remember the first loss for this step's checkpoint."""
        if not trainer.due(self.config.eval.every):
            return
        rows = [self._row(trainer, k) for k in self.config.eval.k or (None,)]
        # A checkpoint cannot be the best for a loss that is not a number.
        loss = rows[0]["eval_loss"]
        trainer.progress.eval_loss = loss if math.isfinite(loss) else None
        for row in rows:
            self.journal.row(row)

    def _row(self, trainer: Trainer, k: int | None) -> dict[str, Any]:
        with trainer.throughput.paused(), trainer.engine.model.at_k(k):
            held_out = self.measure(self.config.eval.max_batches)
        moe = self.config.model.moe
        row: dict[str, Any] = {
            "step": trainer.progress.step,
            "eval_loss": held_out.loss,
            "k": k or (moe.used_router.fixed_k if moe else None),
        }
        if held_out.bits_per_byte is not None:
            row["eval_bits_per_byte"] = held_out.bits_per_byte
        return row


class SaveCheckpoints(Callback):
    """Saves every `checkpoint.every` steps and at the last one."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Save, and see to it that a failed background save is noticed."""
        trainer.checkpoints.check()
        if trainer.due(trainer.config.checkpoint.every):
            with trainer.throughput.paused():
                trainer.save()


class TellStatus(Callback):
    """Keeps status.json."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def on_start(self, trainer: Trainer) -> None:
        """Say that the run is under way."""
        self.journal.status("running", trainer.progress.step)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Say how far it is, as often as it logs."""
        if trainer.due(trainer.config.metrics.log_every):
            self.journal.status("running", trainer.progress.step)

    def on_end(self, trainer: Trainer) -> None:
        """Say that it is complete."""
        self.journal.status("finished", trainer.progress.step)


class _Slots:
    """Counts the experts that tokens really had between two rows."""

    def __init__(self) -> None:
        self.served = self.possible = 0

    def add(self, result: StepResult) -> None:
        """Add a step."""
        self.served += int(result.counts_LE.sum() - result.dropped_L.sum())
        self.possible += result.num_tokens * len(result.counts_LE)

    @property
    def mean_k(self) -> float:
        """Experts per token and MoE layer, without the dropped ones."""
        return self.served / max(1, self.possible)


def _means(result: StepResult, moe: MoEConfig) -> dict[str, Any]:
    """Return the means of a step, (L,) each; those of layers inside by the rows that came there."""
    means: dict[str, Any] = {n: m for n, m in result.means.items() if not n.startswith("within_")}
    slots_LMn, prefix, inside = result.vector_means.get("within_slots"), "within_", moe.expert_layer
    while inside is not None:
        assert slots_LMn is not None
        slots_LMn = slots_LMn.reshape(len(slots_LMn), -1, inside.num_slots_counted)
        counts_LME = slots_LMn[:, :, : inside.num_counted] * result.num_tokens
        dropped_L = result.means[f"{prefix}dropped"] * result.num_tokens
        within = statistics_within(counts_LME, dropped_L)
        means |= {prefix + name: value for name, value in within.items()}
        rows_L = result.vector_means[f"{prefix}rows"].sum(1).clamp(min=1e-12)
        for name, mean_L in result.means.items():
            own = name.removeprefix(prefix)
            if own not in (name, "dropped") and not own.startswith("within_"):
                means[name] = mean_L / rows_L
        slots_LMn = slots_LMn[:, :, inside.num_counted :]
        prefix, inside = f"{prefix}within_", inside.expert_layer
    return means


def _biases(layer: torch.nn.Module) -> torch.Tensor:
    """Return the selection biases of all routers of a layer."""
    own = [b.cpu() for name, b in layer.named_buffers() if name.endswith("expert_bias_E")]
    return torch.cat(own) if own else torch.empty(0)


_AUX_KEYS = {"load_balance": "aux_loss", "z": "z_loss"}


def _peak_memory() -> int:
    """Return the most bytes that this process has used, on its GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _known_peak(config: Config, device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.engine.precision)
    return peak_flops(device.type, name, dtype or torch.float32)


def _exp(loss: float) -> float:
    return math.inf if loss >= 700 else math.exp(loss)
