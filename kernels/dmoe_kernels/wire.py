"""Rows as they are sent in eight bits: quantise and bring to send order in one pass, and back.

Each source is read once, and what it became is written to all its rows. The bits of e4m3 are made
and read with integers, so that every target, sm_80 too, takes the same kernel and gives the same
bits. Shapes: N sources, R rows, D model dim, W bytes of a row on the wire.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import rounded

BLOCK = tl.constexpr(128)
"""Numbers that share a scale."""


def quantize_rows(x_ND: Tensor, row_map: tuple[Tensor, ...] | None, width: int) -> Tensor:
    """Return (R, W) uint8: D numbers in e4m3, a biased exponent for each block of 128, and zeros.

    Args:
        x_ND: sources, contiguous.
        row_map: index_R, by_source_R, offsets_N1 of `dmoe.ops.RowMap`; None for a row a source.
        width: W.
    """
    num_sources, dim = x_ND.shape
    num_rows = num_sources if row_map is None else len(row_map[0])
    wire_RW = torch.empty(num_rows, width, dtype=torch.uint8, device=x_ND.device)
    if num_rows:
        blocks = _blocks(dim)
        grid = (num_sources, triton.cdiv(triton.cdiv(dim, BLOCK.value), blocks))
        quantize_kernel[grid](
            x_ND,
            wire_RW,
            x_ND if row_map is None else row_map[1],
            x_ND if row_map is None else row_map[2],
            dim,
            width,
            HAS_MAP=row_map is not None,
            BLOCKS=blocks,
        )
    return wire_RW


def dequantize_rows(wire_RW: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return (R, D) in `dtype`, within its range."""
    num_rows, width = wire_RW.shape
    x_RD = torch.empty(num_rows, dim, dtype=dtype, device=wire_RW.device)
    if num_rows:
        blocks = _blocks(dim)
        grid = (num_rows, triton.cdiv(triton.cdiv(dim, BLOCK.value), blocks))
        dequantize_kernel[grid](wire_RW.contiguous(), x_RD, dim, width, BLOCKS=blocks)
    return x_RD


def _blocks(dim: int) -> int:
    return min(16, triton.next_power_of_2(triton.cdiv(dim, BLOCK.value)))


@triton.jit
def to_e4m3(x):
    """Return the e4m3 bits of float32 `x`, to nearest even; NaN where it is above 448 or NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    rest = bits & 0x7FFFFFFF
    normal = ((rest + 0x7FFFF + ((rest >> 20) & 1)) >> 20) - 960
    # Below 2^-6 e4m3 numbers are multiples of 2^-9, as float32 numbers above 2^14 are.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    return tl.where(magnitude <= 448.0, code, 0x7F) | ((bits >> 24) & 0x80)


@triton.jit
def from_e4m3(code):
    """Return the float32 number of e4m3 bits."""
    rest = code & 0x7F
    normal = ((rest << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(rest < 8, rest.to(tl.float32) * 0.001953125, normal)
    magnitude = tl.where(rest == 0x7F, float("nan"), magnitude)
    return tl.where(code >= 0x80, -magnitude, magnitude)


@triton.jit
def block_exponent(largest):
    """Return the biased exponent of the least power of two that brings `largest` to at most 448."""
    bits = largest.to(tl.int32, bitcast=True)
    above = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.maximum((bits >> 23) - 8 + above, 1)


@triton.jit
def quantize_kernel(
    x, wire, by_source, offsets, dim, width, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr
):
    """Quantise BLOCKS blocks of one source and write them to each of its rows."""
    source = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    col = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = col < dim
    value = tl.load(x + source * dim + col, mask=inside, other=0.0).to(tl.float32)
    exponent = block_exponent(tl.max(tl.abs(value), 1))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    code = to_e4m3(value * inverse[:, None]).to(tl.uint8)
    num_blocks = tl.cdiv(dim, BLOCK)
    rest = dim + num_blocks + tl.arange(0, 16)
    if HAS_MAP:
        begin, end = tl.load(offsets + source), tl.load(offsets + source + 1)
    else:
        begin, end = source, source + 1
    for j in range(begin, end):
        row = tl.load(by_source + j) if HAS_MAP else j
        out = wire + row.to(tl.int64) * width
        tl.store(out + col, code, mask=inside)
        tl.store(out + dim + block, exponent.to(tl.uint8), mask=block < num_blocks)
        if tl.program_id(1) == 0:
            tl.store(out + rest, tl.zeros((16,), tl.uint8), mask=rest < width)


@triton.jit
def dequantize_kernel(wire, x, dim, width, BLOCKS: tl.constexpr):
    """Write the numbers of BLOCKS blocks of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    col = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = col < dim
    code = tl.load(wire + row * width + col, mask=inside, other=0).to(tl.int32)
    exponent = tl.load(wire + row * width + dim + block, mask=block * BLOCK < dim, other=1)
    scale = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    value = from_e4m3(code) * scale[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    if dtype == tl.float16:
        # The largest may have been rounded up, beyond what float16 holds.
        value = tl.where(value > 65504.0, 65504.0, tl.where(value < -65504.0, -65504.0, value))
    tl.store(x + row * dim + col, rounded(value, dtype), mask=inside)
