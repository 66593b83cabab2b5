"""The n largest scores of each token as a mask, exactly n of them, ties to the lowest index.

Masks are kept packed, one bit a score, the first in the lowest bit of a byte. Sorting a row takes
longer than the matrix products that the mask is for, so on a CPU the threshold comes from a
partition, and NumPy does what it does in less time than torch. Shapes: T tokens, F scores.
"""

import numpy as np
import torch
from torch import Tensor

from dmoe.ops.top_k import top_k_ids


def top_bits(scores_TF: Tensor, n: int) -> Tensor:
    """Return (T, F / 8) uint8, the packed mask of the `n` largest scores; NaN counts as largest.

    Args:
        scores_TF: float32 or float64; F is a multiple of 8.
        n: from 1 to F.
    """
    num = scores_TF.shape[1]
    if scores_TF.device.type != "cpu" or n == num:
        return pack_bits(top_mask(scores_TF, n))
    scores = scores_TF.detach().numpy()
    threshold_T1 = np.partition(scores, num - n, axis=1)[:, num - n, None]
    bits = np.packbits(scores >= threshold_T1, axis=1, bitorder="little")
    [wrong_X] = (np.bitwise_count(bits).sum(1) != n).nonzero()
    if len(wrong_X):  # ties at the threshold, or NaN
        exact_XF = top_mask_sorted(scores_TF[torch.from_numpy(wrong_X)], n)
        bits[wrong_X] = pack_bits(exact_XF).numpy()
    return torch.from_numpy(bits)


def top_mask(scores_TF: Tensor, n: int) -> Tensor:
    """Return (T, F) bool, True at the `n` largest scores of each row; NaN counts as largest.

    Args:
        scores_TF: float32 or float64.
        n: from 1 to F.
    """
    if n == scores_TF.shape[1]:
        return torch.ones_like(scores_TF, dtype=torch.bool)
    chosen_TF = torch.zeros_like(scores_TF, dtype=torch.bool)
    return chosen_TF.scatter_(1, top_k_ids(scores_TF, n), True)


def top_mask_sorted(scores_TF: Tensor, n: int) -> Tensor:
    """Define `top_mask` by a stable sort."""
    order_TF = torch.sort(scores_TF, dim=1, descending=True, stable=True).indices
    chosen_TF = torch.zeros_like(scores_TF, dtype=torch.bool)
    return chosen_TF.scatter_(1, order_TF[:, :n], True)


def pack_bits(mask_TF: Tensor) -> Tensor:
    """Pack (T, F) bool, F a multiple of 8, into (T, F / 8) uint8."""
    if mask_TF.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask_TF.numpy(), axis=1, bitorder="little"))
    return pack_bits_torch(mask_TF)


def pack_bits_torch(mask_TF: Tensor) -> Tensor:
    """Do what `pack_bits` does on any device."""
    eight_at_once = mask_TF.contiguous().view(torch.int64)
    # The product moves byte i, which is 0 or 1, to bit 56 + i; no two of its terms meet.
    return ((eight_at_once * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """Return the (T, F) bool that `pack_bits` packed."""
    if bits.device.type == "cpu":
        mask_TF = np.unpackbits(bits.numpy(), axis=1, bitorder="little")
        return torch.from_numpy(mask_TF).view(torch.bool)
    return unpack_bits_torch(bits)


def unpack_bits_torch(bits: Tensor) -> Tensor:
    """Do what `unpack_bits` does on any device."""
    place_8 = torch.arange(8, device=bits.device)
    return (bits[:, :, None] >> place_8 & 1).bool().flatten(1)


def unpack_bytes(bits: Tensor) -> Tensor:
    """Return the mask as (T, F) uint8, which a CPU turns to floats in a quarter of bool's time."""
    return unpack_bits(bits).view(torch.uint8)


def count_by_column(bits: Tensor) -> Tensor:
    """Return (F,) int64: how many of the T masks have each bit."""
    counts_F = torch.zeros(8 * bits.shape[1], dtype=torch.int64, device=bits.device)
    # Eight counters in the bytes of one number, which 255 rows do not overflow.
    for start in range(0, len(bits), 255):
        eight_at_once = unpack_bits(bits[start : start + 255]).view(torch.int64)
        counts_F += eight_at_once.sum(0).view(torch.uint8)
    return counts_F


def count_ones(bits: Tensor) -> Tensor:
    """Return (), how many bits of all are set: pairs, fours and eights, added up side by side."""
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return ((bits + (bits >> 4)) & 0x0F).sum()
