"""Sort the slots of a routing by expert, and the maps from rows to tokens and back.

Shapes: T tokens, K slots per token, E experts, R routed rows.
"""

import torch
from torch import Tensor

from dmoe.ops.rows import RowMap, offsets_of


def sort_slots(
    expert_ids_TK: Tensor, num_experts: int, *, by_triton: bool = False
) -> tuple[Tensor, RowMap, Tensor]:
    """Sort the used slots by expert, then by token.

    Args:
        expert_ids_TK: (T, K) int64, -1 where a slot is unused.
        num_experts: E.
        by_triton: use the kernels; the host then does not wait to learn how many slots are used:
            there are T K rows, and those past the sum of the counts are the unused slots, of no
            token.

    Returns:
        (R,) slot numbers t K + k in sorted order, the map from rows to tokens, and (E,) counts.
    """
    if by_triton:
        from dmoe_kernels.slots import sort_slots

        slots_R, *row_map, counts_E = sort_slots(expert_ids_TK, num_experts)
        return slots_R, RowMap(*row_map), counts_E
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


def count_slots(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Return (E,) int64: how many slots each expert has."""
    ids = expert_ids_TK.flatten() + 1
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=num_experts + 1)[1:]
    # There the host would wait to learn the largest id.
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[1:]
