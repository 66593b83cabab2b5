"""Groups of consecutive tokens of a micro-batch, over which a balance loss is a mean.

Shapes: T tokens, G groups, S tokens of a group.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from dmoe.moe.routing import BatchTotals

GroupScope = Literal["micro_batch", "sequence"] | PositiveInt
"""A micro-batch is one group, or each sequence, or each so many consecutive tokens."""


def in_groups(values_T: Tensor, size: int) -> Tensor:
    """Return (G, S, ...) of (T, ...); zeros fill up the last group."""
    num_groups = -(-len(values_T) // size)
    fill = (0, 0) * (values_T.ndim - 1) + (0, num_groups * size - len(values_T))
    return F.pad(values_T, fill).unflatten(0, (num_groups, size))


def groups_of_batch(scope: GroupScope, size: int, num_tokens: int, totals: BatchTotals) -> int:
    """Return the groups of the global batch.

    Args:
        scope: what is a group.
        size: tokens of one.
        num_tokens: of this micro-batch; all have equally many, padding included.
        totals: sizes of the global batch.
    """
    if scope == "sequence":
        return totals.num_sequences
    return -(-max(1, num_tokens) // size) * totals.num_micro_batches
