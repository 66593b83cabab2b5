"""What dispatchers hand to experts, and the sort by expert that they share.

Shapes: N source rows, R routed rows, T tokens, E experts, K slots per token, D model dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.moe.routing import count_slots
from dmoe.ops import RowMap, gather
from dmoe.ops.rows import offsets_of


class Rows(NamedTuple):
    """The routed rows x_RD, sorted by local expert, not yet gathered.

    Experts that read their input through the map never write x_RD nor save it for backward; others
    call `gather` and `gather_sum`. They return y_ND: for each source the sum of its rows' outputs
    times their gates, which come along for the same reason.
    """

    x_ND: Tensor
    """(N, D) the rows to read from."""
    map: RowMap
    """From routed rows to source rows."""
    weights_R: Tensor
    """(R,) gate of each routed row."""

    def gather(self) -> Tensor:
        """Return x_RD, (R, D), as a tensor of its own."""
        return gather(self.x_ND, self.map)


def sort_slots(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, RowMap, Tensor]:
    """Sort the used slots by expert, then by token.

    Returns:
        (R,) slot numbers t K + k in sorted order, the map from rows to tokens, and (E,) counts.
    """
    top_k = expert_ids_TK.shape[1]
    ids = expert_ids_TK.flatten()
    used = ids >= 0
    counts_E = count_slots(expert_ids_TK, num_experts)
    num_rows = int(counts_E.sum())
    slots_R = ids.masked_fill(~used, num_experts).int().argsort(stable=True)[:num_rows]
    offsets_T1 = offsets_of(used.view_as(expert_ids_TK).sum(1))
    # The inverse of a permutation needs no second sort.
    row_of_slot = torch.empty_like(ids)
    row_of_slot[slots_R] = torch.arange(num_rows, device=ids.device)
    by_token_R = row_of_slot if num_rows == len(ids) else row_of_slot[used]
    rows = RowMap(slots_R // top_k, by_token_R, offsets_T1)
    return slots_R, rows, counts_E
