"""The engine protocol: how one optimizer step is computed, whatever shards the parameters.

Called by the trainer in this order: `forward_backward`, `clip`, then `step` or `skip`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from dmoe.config.base import ConfigModel
from dmoe.data import MicroBatch
from dmoe.models import DecoderLM
from dmoe.models.precision import Precision
from dmoe.moe import SparseLayer


class EngineConfig(ConfigModel):
    """What shards and computes a step."""

    name: Literal["native"] = "native"
    """"native" is FSDP2 with experts over their own ranks."""
    zero_stage: Literal[0, 2, 3] = 0
    """What the ranks share out: 0 nothing, 2 gradients and optimizer state, 3 parameters as well.
    Experts are shared out over the ranks that hold the same ones."""
    precision: Precision = "fp32"
    """Of activations and products. Master weights, gradients and optimizer state are float32; fp64,
    for proofs, is float64 throughout."""
    compile: bool = False
    """Compile attention, norms and dense feed-forward layers with `torch.compile`."""


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
    expert_means: dict[str, Tensor]
    """(L, E) float64 each, the same of sums by expert."""
    num_tokens: int
    """Tokens that are not padding."""

    def end_step(self, layers: Sequence[SparseLayer]) -> None:
        """Let the MoE layers of a model adapt to the step."""
        for index, layer in enumerate(layers):
            means = {name: mean_LE[index] for name, mean_LE in self.expert_means.items()}
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

        The tensors are the live ones, to be saved, or filled in place when loading.
        """
        ...

    def scalars(self) -> dict[str, float]:
        """Return the numbers that belong to the state."""
        ...

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Take back what `scalars` returned; call after `state` has been filled."""
        ...
