"""What a MoE layer reports of one micro-batch; sums, so that they add up over ranks and steps.

Shapes: T tokens, E experts.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.moe.routing import MoEContext, Routing


class MoEStats(NamedTuple):
    """Sums over the tokens of a micro-batch that are not padding; no gradient."""

    counts_E: Tensor
    """(E,) int64 slots that the router gave each expert."""
    dropped: Tensor
    """() int64 slots that found no capacity."""
    sums: dict[str, Tensor]
    """() each, whatever else a layer tells of itself, by name; a layer of the same configuration
    tells the same. `entropy` is that of a token's router scores, divided by log E. Where there is
    NAME and NAME_square, the metrics have the standard deviation, too. Vectors, most of them by
    expert, are for the layer's router alone, in `end_step`."""

    def plus(self, sums: dict[str, Tensor]) -> "MoEStats":
        """Return these with more sums."""
        return self._replace(sums=self.sums | sums)


class Within(NamedTuple):
    """What layers inside a layer report, under names of their own."""

    losses: dict[str, Tensor]
    """As in `MoEOutput`, summed over the layers."""
    sums: dict[str, Tensor]
    """As in `MoEStats`: scalars summed over the layers, vectors one after the other. `within_rows`
    are the tokens that came to each layer, and `within_slots` the counts of them all."""


class MoEOutput(NamedTuple):
    """What a layer returns beside y."""

    losses: dict[str, Tensor]
    """Unweighted auxiliary losses, in training only; a micro-batch's share of the global
    batch's."""
    stats: MoEStats
    """Sums for the metrics and the selection bias."""


@torch.no_grad()
def measure(routing: Routing, dropped: Tensor, context: MoEContext) -> MoEStats:
    """Sum up a routing, of whose slots `dropped`, (), found no capacity."""
    scores_TE = routing.scores_TE.detach()
    # As torch.special.entr, which takes four times as long on a CPU.
    logs_TE = scores_TE.clamp(min=torch.finfo(scores_TE.dtype).tiny).log()
    entropy_T = -torch.linalg.vecdot(scores_TE, logs_TE) / math.log(max(2, scores_TE.shape[1]))
    if context.valid_T is not None:
        entropy_T = entropy_T * context.valid_T
    return MoEStats(routing.counts_E, dropped, {"entropy": entropy_T.sum(), **routing.sums})


def all_counts(stats: MoEStats) -> Tensor:
    """Return int64 slots of a layer's experts, then those of the layers inside it."""
    inside = stats.sums.get("within_slots")
    return stats.counts_E if inside is None else torch.cat((stats.counts_E, inside))


def within_of(outputs: list[MoEOutput], rows_E: Tensor) -> Within:
    """Join what layers of the same configuration report.

    Args:
        outputs: of each layer.
        rows_E: int64 tokens that came to each.
    """
    all_stats = [output.stats for output in outputs]
    sums = {
        "rows": rows_E,
        "slots": torch.cat([all_counts(stats) for stats in all_stats]),
        "dropped": torch.stack([stats.dropped for stats in all_stats]).sum(),
    }
    for name, first in all_stats[0].sums.items():
        parts = [stats.sums[name] for stats in all_stats]
        if name != "within_slots":  # they are among the counts
            sums[name] = torch.cat(parts) if first.ndim else torch.stack(parts).sum()
    losses = {
        name: torch.stack([output.losses[name] for output in outputs]).sum()
        for name in outputs[0].losses
    }
    return Within(*({f"within_{n}": t for n, t in part.items()} for part in (losses, sums)))
