"""What passes between router, losses and dispatcher, and what a layer knows of the step.

Shapes: T tokens, E experts, K slots per token, B sequences, S sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.ops import count_slots
from dmoe.rng import stream_key

Samples = int | Literal["mean"]
"""Experts drawn from a continuous space for each token; "mean" for the one at the mean of z."""


class Routing(NamedTuple):
    """A router's decision; a slot of -1 is unused, so each token may use its own number."""

    expert_ids_TK: Tensor
    """(T, K) int64 expert of each slot, or -1."""
    weights_TK: Tensor
    """(T, K) float32 gate of each slot, 0 where unused; carries the gradient to the router."""
    scores_TE: Tensor
    """(T, E) float32 router probabilities, rows summing to 1, for the balance losses."""
    logits_TE: Tensor
    """(T, E) float32 router output."""
    counts_E: Tensor
    """(E,) int64 slots that the router gave each expert, before any capacity."""
    sums: dict[str, Tensor]
    """What else the router tells of itself, as in `MoEStats.sums`."""
    losses: dict[str, Tensor]
    """The router's own losses, unweighted, in training: () each, this micro-batch's share of the
    global batch's; those that the weights of its section name."""
    num_places: int | None = None
    """The most slots that an expert serves, by a capacity, on any rank; None without one."""


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of the whole global batch of a step, the normalisers that no layout changes."""

    num_tokens: int
    """Tokens that are not padding."""
    num_targets: int
    """Labels that count in the cross-entropy."""
    num_sequences: int
    num_micro_batches: int


class Replay:
    """Decisions of the first forward pass, given back when activations are recomputed.

    A recomputed score may differ in its last bit; a decision made twice could then differ, and the
    all-to-all splits with it. So decisions are made once per micro-batch.
    """

    def __init__(self) -> None:
        self._decisions: dict[tuple[int, str], Tensor] = {}

    def __call__(self, layer: int, name: str, decide: Callable[[], Tensor]) -> Tensor:
        """Return the decision, made by `decide` the first time."""
        key = (layer, name)
        if key not in self._decisions:
            with torch.no_grad():
                self._decisions[key] = decide()
        return self._decisions[key]


class Inside(Replay):
    """The decisions of a router that is within another one, kept under names of their own."""

    def __init__(self, outer: Replay, name: str) -> None:
        self._outer, self._name = outer, name

    def __call__(self, layer: int, name: str, decide: Callable[[], Tensor]) -> Tensor:
        """Return the decision, made by `decide` the first time."""
        return self._outer(layer, f"{self._name}/{name}", decide)


@dataclass(frozen=True)
class MoEContext:
    """What a layer may know of the micro-batch it works on; every micro-batch has its own."""

    seq_len: int
    """Tokens are whole sequences of this length, one after the other."""
    valid_T: Tensor | None = None
    """(T,) bool, False for padding; None where there is no padding."""
    token_ids_T: Tensor | None = None
    """(T,) int64 number of each token in the order of all training tokens; needed by random
    routers."""
    vocab_ids_T: Tensor | None = None
    """(T,) int64 id of each token in the vocabulary; needed by routers that go by the word."""
    totals: BatchTotals | None = None
    """Set in training: the losses are normalised by it."""
    counts_LE: Tensor | None = None
    """(layers, E) int64 slots per expert over the global batch, where they were counted
    beforehand; then those of the layers inside."""
    k_L: tuple[int | Tensor, ...] | None = None
    """Experts per token in each MoE layer: one number, or (T,) int64 with one for each token; None
    for the router's own."""
    k_ideal: int | None = None
    """In training, draw a token's experts at random from so many best; None to take the best."""
    gate_threshold: float = 0.0
    """In [0, 1); a token skips the chosen experts whose score is below this share of its largest.
    At inference only."""
    samples: Samples | None = None
    """Experts of each token in a continuous space; None for the layer's own choice. At inference
    only."""
    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    layer: int = 0
    path: tuple[str, ...] = ()
    """Where a router or layer is that is within another one: the names given to `inside`."""
    replay: Replay = field(default_factory=Replay)

    def __post_init__(self) -> None:
        check_gate_threshold(self.gate_threshold)
        if self.gate_threshold and self.training:
            raise ConfigError(
                f"a gate threshold of {self.gate_threshold} is for inference: set it to 0 to train"
            )

    @property
    def training(self) -> bool:
        """Whether noise is drawn and losses are wanted."""
        return self.totals is not None

    @property
    def k(self) -> int | Tensor | None:
        """Experts per token in this layer; None for the router's own."""
        return None if self.k_L is None else self.k_L[self.layer]

    def k_or(self, own: int) -> int | Tensor:
        """Return the experts per token in this layer, `own` where nothing else is said."""
        return own if self.k is None else self.k

    def at_layer(self, layer: int) -> "MoEContext":
        """Return the context of one layer."""
        return replace(self, layer=layer)

    def inside(self, name: str, rows_R: Tensor | None = None) -> "MoEContext":
        """Return the context of a router within this one, for all tokens or for rows of them.

        Its decisions and its noise are its own. How many experts a token has is its own affair.

        Args:
            name: no other router has it.
            rows_R: (R,) int64 tokens that it sees, none of them padding; None for all.
        """
        inner = replace(
            self,
            replay=Inside(self.replay, name),
            seed=stream_key(self.seed, "nested", name),
            path=(*self.path, name),
            k_L=None,
            k_ideal=None,
            gate_threshold=0.0,
        )
        if rows_R is None:
            return inner
        token_ids_T, vocab_ids_T, totals = self.token_ids_T, self.vocab_ids_T, self.totals
        if totals is not None:
            # The rows of a micro-batch stand for one sequence, so there are as many of these.
            totals = replace(totals, num_sequences=totals.num_micro_batches)
        return replace(
            inner,
            totals=totals,
            seq_len=max(1, len(rows_R)),
            valid_T=None,
            token_ids_T=None if token_ids_T is None else token_ids_T[rows_R],
            vocab_ids_T=None if vocab_ids_T is None else vocab_ids_T[rows_R],
        )

    def decide(self, name: str, decide: Callable[[], Tensor]) -> Tensor:
        """Return this layer's decision of that name, the same one under recomputation."""
        return self.replay(self.layer, name, decide)


def check_gate_threshold(threshold: float) -> None:
    """Check that a threshold is a share of the largest score that the largest itself reaches.

    Raises:
        ConfigError: it is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ConfigError(
            f"gate threshold = {threshold} is not in [0, 1): 0 skips no expert, and at 1 or above "
            f"a token would skip its best"
        )


def make_routing(
    logits_TE: Tensor,
    scores_TE: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    sums: dict[str, Tensor] | None = None,
    losses: dict[str, Tensor] | None = None,
) -> Routing:
    """Complete a routing: zero the weights of unused slots and count the slots of each expert."""
    used_TK = expert_ids_TK >= 0
    return Routing(
        expert_ids_TK,
        weights_TK.masked_fill(~used_TK, 0),
        scores_TE,
        logits_TE,
        count_slots(expert_ids_TK, logits_TE.shape[1]),
        sums or {},
        losses or {},
    )
