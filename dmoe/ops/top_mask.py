"""The n largest scores of each token as a mask, exactly n of them, ties to the lowest index.

Sorting a row takes longer than the matrix products that the mask is for, so on a CPU the threshold
comes from a partition. Masks are kept packed, one bit a score. Shapes: T tokens, F scores.
"""

import numpy as np
import torch
from torch import Tensor

from dmoe.ops.top_k import top_k_ids


def top_mask(scores_TF: Tensor, n: int) -> Tensor:
    """Return (T, F) bool, True at the `n` largest scores of each row; NaN counts as largest.

    Args:
        scores_TF: float32 or float64.
        n: from 1 to F.
    """
    if n == scores_TF.shape[1]:
        return torch.ones_like(scores_TF, dtype=torch.bool)
    if scores_TF.device.type != "cpu":
        chosen_TF = torch.zeros_like(scores_TF, dtype=torch.bool)
        return chosen_TF.scatter_(1, top_k_ids(scores_TF, n), True)
    place = scores_TF.shape[1] - n
    threshold_T = np.partition(scores_TF.detach().numpy(), place, axis=1)[:, place].copy()
    chosen_TF = scores_TF >= torch.from_numpy(threshold_T)[:, None]
    counts_T = chosen_TF.view(torch.uint8).sum(1, dtype=torch.int32)
    wrong_X = (counts_T != n).nonzero()[:, 0]
    if len(wrong_X):  # ties at the threshold, or NaN
        chosen_TF[wrong_X] = top_mask_sorted(scores_TF[wrong_X], n)
    return chosen_TF


def top_mask_sorted(scores_TF: Tensor, n: int) -> Tensor:
    """Define `top_mask` by a stable sort."""
    order_TF = torch.sort(scores_TF, dim=1, descending=True, stable=True).indices
    chosen_TF = torch.zeros_like(scores_TF, dtype=torch.bool)
    return chosen_TF.scatter_(1, order_TF[:, :n], True)


def pack_bits(mask_TF: Tensor) -> Tensor:
    """Pack (T, F) bool, F a multiple of 8, into (T, F / 8) uint8, the first in the lowest bit."""
    eight_at_once = mask_TF.contiguous().view(torch.int64)
    # The product moves byte i, which is 0 or 1, to bit 56 + i; no two of its terms meet.
    return ((eight_at_once * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """Return the (T, F) bool that `pack_bits` packed."""
    place_8 = torch.arange(8, device=bits.device)
    byte_256 = torch.arange(256, device=bits.device)
    table = (byte_256[:, None] >> place_8 & 1).to(torch.uint8).view(torch.int64).flatten()
    return table[bits.long()].view(torch.bool)
