"""The engine protocol: how one optimizer step is computed, whatever shards the parameters.

Called by the trainer in this order: `forward_backward`, `clip`, then `step` or `skip`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator
from torch import Tensor

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.data import MicroBatch
from dmoe.engine.zero_config import deepspeed_settings
from dmoe.models import DecoderLM
from dmoe.models.precision import Precision
from dmoe.moe import SparseLayer


class EngineConfig(ConfigModel):
    """What shards and computes a step."""

    name: Literal["native", "deepspeed"] = "native"
    """"native" is FSDP2; "deepspeed" is ZeRO for the dense parameters of the layers. Experts are
    dmoe's own in both."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the ranks share out: 0 nothing (native), 1 optimizer state (deepspeed), 2 gradients as
    well, 3 parameters as well. Experts are shared out over the ranks that hold the same ones; by
    deepspeed with gradients and optimizer state at every stage."""
    precision: Precision = "fp32"
    """Of activations and products. Master weights, gradients and optimizer state are float32; fp64,
    for proofs, is float64 throughout."""
    compile: bool = False
    """Compile attention, norms and dense feed-forward layers with `torch.compile` (native). In
    float32 on AMD's processors with AVX-512 it leaves products to MKL, which is slower there."""
    tune_kernels: bool = False
    """Measure the tile shapes of the experts' Triton kernels at each size that was not measured
    before, which takes minutes the first time and memory for one more result, and keep the fastest
    beside Triton's cache. Each rank measures for itself, and other shapes may round sums otherwise:
    tune in a short run of its own, then train with false, where what was kept is used."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's configuration, under its names; what dmoe decides is refused."""

    @model_validator(mode="after")
    def _back_end_can(self) -> "EngineConfig":
        if self.name == "native":
            _check_native(self)
        else:
            _check_deepspeed(self)
        return self


def _check_native(config: EngineConfig) -> None:
    if config.zero_stage == 1:
        raise ConfigError(
            "engine.zero_stage = 1 is for engine.name = deepspeed alone: set it to 2, which shares "
            "out gradients as well, or choose that engine",
            key="zero_stage",
        )
    if config.deepspeed:
        raise ConfigError(
            "engine.deepspeed has settings, which engine.name = native does not read: remove them, "
            "or set engine.name = deepspeed",
            key="deepspeed",
        )


def _check_deepspeed(config: EngineConfig) -> None:
    stage, precision = config.zero_stage, config.precision
    for key, holds, reason in (
        ("zero_stage", stage == 0, "always shares something out: set it to 1, 2 or 3"),
        ("precision", precision == "fp64", "has no float64: set it to fp32, bf16 or fp16"),
        ("compile", config.compile, "runs eagerly: set it to false"),
    ):
        if holds:
            raise ConfigError(
                f"engine.{key} = {getattr(config, key)}, but engine.name = deepspeed {reason}, or "
                f"choose engine.name = native",
                key=key,
            )
    deepspeed_settings(stage=stage, precision=precision, extra=config.deepspeed)


@dataclass(frozen=True)
class StepPosition:
    """Where a step stands; all that randomness and normalisation depend on."""

    seed: int
    step: int
    """Number of the step, from 0, counting skipped ones."""
    num_sequences: int
    """Sequences of the global batch."""
    num_micro_batches: int
    """Micro-batches of the global batch."""


@dataclass(frozen=True)
class StepResult:
    """What a step found, over the whole global batch and equal on every rank."""

    loss: float
    """Cross-entropy in nats a target token."""
    aux_losses: dict[str, float]
    """Unweighted auxiliary losses, mean over the layers."""
    counts_LE: Tensor
    """(L, E) int64 slots that each MoE layer's router gave each expert."""
    dropped_L: Tensor
    """(L,) int64 slots without capacity."""
    means: dict[str, Tensor]
    """(L,) float64 each, the layers' other sums (`dmoe.moe.MoEStats`) by name, a token's mean."""
    vector_means: dict[str, Tensor]
    """(L, n) float64 each, the same of sums that are vectors, such as those by expert."""
    num_tokens: int
    """Tokens that are not padding."""

    def end_step(self, layers: Sequence[SparseLayer]) -> None:
        """Let the MoE layers of a model adapt to the step."""
        for index, layer in enumerate(layers):
            means = {name: mean_Ln[index] for name, mean_Ln in self.vector_means.items()}
            layer.end_step(self.counts_LE[index], self.num_tokens, means)


class Engine(Protocol):
    """One step of training; back ends give the same numbers."""

    model: DecoderLM

    def forward_backward(self, batches: Sequence[MicroBatch], position: StepPosition) -> StepResult:
        """Compute the gradients of the global batch, of which `batches` are this rank's share."""
        ...

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a global norm of `max_norm` (0: do not); return the norm."""
        ...

    def step(self, lr: float, result: StepResult) -> None:
        """Update parameters, let the routers adapt to what was found, and drop the gradients."""
        ...

    def skip(self) -> None:
        """Drop the gradients of a step that is not taken."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return parameters, buffers and optimizer state under global names and shapes.

        To be saved; or to be filled in place and given to `load_state`.
        """
        ...

    def scalars(self) -> dict[str, float]:
        """Return the numbers that belong to the state."""
        ...

    def load_state(self, state: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Take back what `state` and `scalars` returned, filled with other values."""
        ...
