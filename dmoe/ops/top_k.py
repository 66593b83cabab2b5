"""Top-k with ties broken by the lowest index, which `torch.topk` does not promise.

Shapes: T tokens, E experts, K chosen.
"""

import torch
from torch import Tensor


def top_k_ids(scores_TE: Tensor, k: int) -> Tensor:
    """Return (T, K) int64 ids of the largest scores, largest first, ties by lowest id."""
    if scores_TE.dtype == torch.float64:
        return top_k_ids_sorted(scores_TE, k)
    return _pack(scores_TE).topk(k, dim=-1, sorted=True).indices


def top_k_ids_sorted(scores_TE: Tensor, k: int) -> Tensor:
    """Define `top_k_ids` by a stable sort."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def _pack(scores_TE: Tensor) -> Tensor:
    """Pack score and index into one int64 that orders as (score descending, index ascending)."""
    num_experts = scores_TE.shape[-1]
    # Adding zero makes -0.0 equal to 0.0, as it is for a comparison of floats.
    bits = (scores_TE.float() + 0.0).view(torch.int32)
    # IEEE floats order as integers once the lower bits of negative ones are flipped.
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    last = torch.arange(num_experts - 1, -1, -1, device=scores_TE.device)
    return ordered.long().mul_(2**32).add_(last)
