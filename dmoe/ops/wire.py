"""Rows as they are sent in eight bits: e4m3 numbers, and a power of two for each 128 of them.

A byte a number and one a block is a little over half of bfloat16. Scales are powers of two, as
DeepSeek-V3 has them for what it dispatches (arXiv 2412.19437, section 3.3.3): they scale without
rounding, so the same numbers are sent on every device. Shapes: N sources, R rows, D model dim, B
blocks of a row, W bytes of a row on the wire.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.rows import RowMap

BLOCK = 128
"""Numbers that share a scale."""
E4M3_MAX = 448.0


def wire_width(dim: int) -> int:
    """Return W: D numbers, a scale a block, and zeros up to whole 16 bytes, so rows are aligned."""
    return -(-(dim + -(-dim // BLOCK)) // 16) * 16


def quantize_rows(x_ND: Tensor, rows: RowMap | None = None, *, by_triton: bool = False) -> Tensor:
    """Return (R, W) uint8: each routed row's source, as it is sent; no gradient.

    A row is D numbers in e4m3, then B biased exponents of the scales (e8m0), then zeros. The scale
    of a block is the least power of two that leaves none of its numbers above 448. Numbers that are
    not finite become NaN.

    Args:
        x_ND: source rows.
        rows: from routed rows to sources; None for the rows of `x_ND` as they are.
        by_triton: use the kernel, which quantises each source once and writes all its rows.
    """
    if by_triton:
        from dmoe_kernels.wire import quantize_rows

        rows = rows and rows.contiguous()
        return quantize_rows(x_ND.contiguous(), rows, wire_width(x_ND.shape[1]))
    dim = x_ND.shape[1]
    blocks_NBX = F.pad(x_ND.float(), (0, -dim % BLOCK)).unflatten(1, (-1, BLOCK))
    exponent_NB = block_exponents(blocks_NBX.abs().amax(2))
    inverse_NB = ((254 - exponent_NB) << 23).view(torch.float32)
    numbers_ND = (blocks_NBX * inverse_NB[:, :, None]).flatten(1)[:, :dim].to(torch.float8_e4m3fn)
    parts = [numbers_ND.view(torch.uint8), exponent_NB.to(torch.uint8)]
    wire_NW = F.pad(torch.cat(parts, 1), (0, wire_width(dim) - dim - exponent_NB.shape[1]))
    return wire_NW if rows is None else wire_NW.index_select(0, rows.index_R)


def block_exponents(largest: Tensor) -> Tensor:
    """Return int32, biased: the least powers of two that bring magnitudes to at most 448."""
    # The largest, m 2^a with m below 2, is at most 448 = 1.75 x 2^8 times 2^(a - 8), or the next.
    bits = largest.view(torch.int32)
    return ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)).clamp(min=1)


def dequantize_rows(
    wire_RW: Tensor, dim: int, dtype: torch.dtype, *, by_triton: bool = False
) -> Tensor:
    """Return (R, D) in `dtype`: what the rows of a wire stand for, within the range of `dtype`.

    Args:
        wire_RW: of `quantize_rows`.
        dim: D.
        dtype: of the result.
        by_triton: use the kernel.
    """
    if by_triton:
        from dmoe_kernels.wire import dequantize_rows

        return dequantize_rows(wire_RW, dim, dtype)
    num_blocks = -(-dim // BLOCK)
    numbers_RD = wire_RW[:, :dim].view(torch.float8_e4m3fn).float()
    scale_RB = (wire_RW[:, dim : dim + num_blocks].int() << 23).view(torch.float32)
    x_RD = numbers_RD * scale_RB.repeat_interleave(BLOCK, 1)[:, :dim]
    if dtype == torch.float16:
        # The largest may have been rounded up, beyond it.
        x_RD = x_RD.clamp(-65504.0, 65504.0)
    return x_RD.to(dtype)
