"""Rows and weights in eight bits: e4m3, with a power of two for each 128, or each 128 x 128.

Dims are multiples of 128. Shapes: R rows, K their length, E experts, M and N of a matrix.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import INTERPRET
from dmoe_kernels.wire import block_exponent, to_e4m3

BLOCK = tl.constexpr(128)
"""Numbers of a row, and rows and columns of a matrix, that share a scale."""


class Quantized(NamedTuple):
    """Numbers in eight bits and what to multiply them with."""

    numbers: Tensor
    """float8_e4m3fn; the last dim is summed in a product."""
    scales: Tensor
    """float32 powers of two: one for each 128 of a row, or 128 x 128 of a matrix."""


def quantize_rows(x_RK: Tensor) -> Quantized:
    """Quantise each 128 of a row; scales (R, K / 128)."""
    size_k = x_RK.shape[1]
    numbers = torch.empty_like(x_RK, dtype=torch.float8_e4m3fn)
    scales = x_RK.new_empty(len(x_RK), size_k // BLOCK.value, dtype=torch.float32)
    if scales.numel():
        blocks = 2 if INTERPRET.value else 32
        quantize_rows_kernel[(triton.cdiv(scales.numel(), blocks),)](
            x_RK, numbers, scales, scales.numel(), BLOCKS=blocks
        )
    return Quantized(numbers, scales)


def quantize_weights(w_EMN: Tensor, *, transposed: bool = False) -> Quantized:
    """Quantise each 128 x 128 of a matrix; scales (E, M / 128, N / 128).

    Args:
        w_EMN: one matrix an expert.
        transposed: return (E, N, M) and (E, N / 128, M / 128), of the same numbers.
    """
    num_experts, size_m, size_n = w_EMN.shape
    shape = (num_experts, size_n, size_m) if transposed else tuple(w_EMN.shape)
    numbers = w_EMN.new_empty(shape, dtype=torch.float8_e4m3fn)
    blocks = (num_experts, shape[1] // BLOCK.value, shape[2] // BLOCK.value)
    scales = w_EMN.new_empty(blocks, dtype=torch.float32)
    grid = (num_experts * (size_m // BLOCK.value), size_n // BLOCK.value)
    quantize_weights_kernel[grid](
        w_EMN, numbers, scales, size_m, size_n, TRANSPOSED=transposed, num_warps=8
    )
    return Quantized(numbers, scales)


@triton.jit
def e4m3(x):
    """Return float32 `x` in e4m3, to nearest even; NaN where it is above 448 or NaN."""
    if INTERPRET:
        # The interpreter would round otherwise.
        return to_e4m3(x).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return tl.where(tl.abs(x) <= 448.0, x, float("nan")).to(tl.float8e4nv)


@triton.jit
def quantized(x, largest):
    """Return `x` in e4m3 and its scale, for the `largest` magnitude of what shares the scale."""
    exponent = block_exponent(largest)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return e4m3(x * inverse), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantize_rows_kernel(x, numbers, scales, num_blocks, BLOCKS: tl.constexpr):
    """Quantise BLOCKS times 128 numbers; blocks lie one after the other, row after row."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + place, mask=inside[:, None], other=0.0).to(tl.float32)
    code, scale = quantized(value, tl.max(tl.abs(value), 1)[:, None])
    tl.store(numbers + place, code, mask=inside[:, None])
    tl.store(scales + block[:, None], scale, mask=inside[:, None])


@triton.jit
def quantize_weights_kernel(w, numbers, scales, size_m, size_n, TRANSPOSED: tl.constexpr):
    """Quantise one 128 x 128 of a matrix, and turn it if it is to lie the other way."""
    blocks_m, blocks_n = size_m // BLOCK, size_n // BLOCK
    expert = (tl.program_id(0) // blocks_m).to(tl.int64)
    m, n = tl.program_id(0) % blocks_m, tl.program_id(1)
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    numbers += expert * size_m * size_n
    scales += expert * blocks_m * blocks_n
    place = expert * size_m * size_n + (m * BLOCK + i) * size_n + n * BLOCK + j
    value = tl.load(w + place).to(tl.float32)
    code, scale = quantized(value, tl.max(tl.max(tl.abs(value), 1), 0))
    if TRANSPOSED:
        tl.store(numbers + (n * BLOCK + i) * size_m + m * BLOCK + j, tl.trans(code))
        tl.store(scales + n * blocks_m + m, scale)
    else:
        tl.store(numbers + (m * BLOCK + i) * size_n + n * BLOCK + j, code)
        tl.store(scales + m * blocks_n + n, scale)
