"""Top-k with ties broken by the lowest index, which `torch.topk` does not promise.

Shapes: T tokens, E experts, C candidates, K chosen.
"""

import torch
from torch import Tensor

_LOW_WORD = 2**32 - 1


def top_k_ids(scores_TE: Tensor, k: int) -> Tensor:
    """Return (T, K) int64 ids of the largest scores, largest first, ties by lowest id."""
    if scores_TE.dtype == torch.float64:
        return top_k_ids_sorted(scores_TE, k)
    ids_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device)
    return _pack(scores_TE, ids_E).topk(k, dim=-1, sorted=True).indices


def top_k_ids_sorted(scores_TE: Tensor, k: int) -> Tensor:
    """Define `top_k_ids` by a stable sort."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def top_k_of_candidates(scores_TC: Tensor, ids_TC: Tensor, k: int) -> Tensor:
    """Return (T, K) the ids of the largest scores, largest first, ties by lowest id.

    Args:
        scores_TC: (T, C) scores.
        ids_TC: (T, C) int64 id of each, below 2^32, in any order; no two of a row are alike.
        k: at most C.
    """
    if scores_TC.dtype == torch.float64:
        ids_TC, order_TC = ids_TC.sort(dim=1)
        return ids_TC.gather(1, top_k_ids_sorted(scores_TC.gather(1, order_TC), k))
    best_TK = _pack(scores_TC, ids_TC).topk(k, dim=-1, sorted=True).values
    return _LOW_WORD - best_TK.bitwise_and_(_LOW_WORD)


def _pack(scores_TC: Tensor, ids_TC: Tensor) -> Tensor:
    """Pack score and id into one int64 that orders as (score descending, id ascending)."""
    # Adding zero makes -0.0 equal to 0.0, as it is for a comparison of floats.
    bits = (scores_TC.float() + 0.0).view(torch.int32)
    # IEEE floats order as integers once the lower bits of negative ones are flipped.
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return ordered.long().mul_(2**32).add_(_LOW_WORD - ids_TC)
