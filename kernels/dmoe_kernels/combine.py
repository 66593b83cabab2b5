"""Combine: each source's rows read through the map and summed in float32; no atomics.

It is also the backward of a gather. Shapes: N sources, R routed rows, D model dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import rounded


def gather_sum(y_RD: Tensor, by_source_R: Tensor, offsets_N1: Tensor) -> Tensor:
    """Return (N, D): the sum of each source's rows, zero where it has none.

    Args:
        y_RD: rows.
        by_source_R: (R,) int64 row numbers, ordered by source.
        offsets_N1: (N + 1,) int64 where each source's rows begin in `by_source_R`.
    """
    num_sources, dim = len(offsets_N1) - 1, y_RD.shape[1]
    x_ND = torch.empty(num_sources, dim, dtype=y_RD.dtype, device=y_RD.device)
    if num_sources:
        block_d = min(1024, triton.next_power_of_2(dim))
        grid = (num_sources, triton.cdiv(dim, block_d))
        gather_sum_kernel[grid](
            y_RD, by_source_R, offsets_N1, x_ND, dim, BLOCK_J=8, BLOCK_D=block_d, num_warps=4
        )
    return x_ND


@triton.jit
def gather_sum_kernel(y, by_source, offsets, x, dim, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum the rows of one source, BLOCK_J of them read at once, in a block of columns."""
    source = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets + source)
    end = tl.load(offsets + source + 1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_J):
        place = first + tl.arange(0, BLOCK_J)
        rows = tl.load(by_source + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (cols < dim)[None, :]
        y_tile = tl.load(y + rows[:, None] * dim + cols[None, :], mask=mask, other=0.0)
        acc += tl.sum(y_tile.to(tl.float32), 0)
    tl.store(x + source * dim + cols, rounded(acc, x.dtype.element_ty), mask=cols < dim)
