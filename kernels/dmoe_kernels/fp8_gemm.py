"""Grouped GEMM in eight bits over rows sorted by expert; persistent, no host wait.

Tensor cores of sm_90 keep fewer bits of a sum than float32 has. So the product of each 128 of K is
added to sums in float32, times the scales of both sides, as DeepSeek-V3 does (arXiv 2412.19437,
section 3.3.2). A tile has two blocks of 128 columns, and their products follow each other: one of
256 columns and its sums would not fit the registers. Weights come by TMA, with K innermost, as
these tensor cores want both sides. All dims are multiples of 128. Shapes: R routed rows, E experts,
and N, K of a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dmoe_kernels.common import num_programs, rounded
from dmoe_kernels.configs import Config, choose, name_of, rows_bucket
from dmoe_kernels.fp8 import BLOCK, Quantized
from dmoe_kernels.product import tile_at
from dmoe_kernels.tiles import Tiles, tile_rows
from dmoe_kernels.tma import descriptor


def grouped_gemm(
    a_RK: Quantized,
    w_ENK: Quantized,
    counts_E: Tensor,
    *,
    dtype: torch.dtype,
    config: Config | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return (R, N) in `dtype`: each expert's rows times its matrix.

    Args:
        a_RK: rows, sorted by expert; those past the sum of the counts are in no product.
        w_ENK: one matrix an expert.
        counts_E: (E,) int64 rows of each expert.
        dtype: of the result; summed in float32.
        config: of the kernel; chosen if None.
        tiles: of `config.block_m` rows, if they were made before.
    """
    (num_experts, size_n, size_k), num_rows = w_ENK.numbers.shape, len(a_RK.numbers)
    if config is None:
        shape = (size_n, size_k, num_experts, rows_bucket(num_rows, num_experts))

        def run(config: Config) -> Tensor:
            return grouped_gemm(a_RK, w_ENK, counts_E, dtype=dtype, config=config, tiles=tiles)

        config = choose(
            "gemm_fp8", name_of(dtype), torch.float8_e4m3fn, shape, counts_E.device, run
        )
    if tiles is None or tiles.block_m != config.block_m:
        tiles = tile_rows(counts_E, num_rows, config.block_m)
    y_RN = torch.empty(num_rows, size_n, dtype=dtype, device=counts_E.device)
    most = tiles.table_3M.shape[1] * triton.cdiv(size_n, 2 * BLOCK.value)
    gemm_kernel[(num_programs(counts_E.device, most),)](
        *a_RK,
        matrix_rows(w_ENK),
        w_ENK.scales,
        y_RN,
        tiles.table_3M,
        tiles.offsets,
        num_experts,
        tiles.table_3M.shape[1],
        size_n,
        size_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y_RN


def matrix_rows(w_ENK: Quantized) -> TensorDescriptor:
    """Return what TMA reads 128 x 128 of all matrices by, one below the other."""
    return descriptor(w_ENK.numbers.flatten(0, 1), [BLOCK.value, BLOCK.value])


@triton.jit
def products(
    a,
    a_scales,
    w,
    w_scales,
    source,
    first,
    second,
    size_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return two float32 (BLOCK_M, 128) products of rows with 128 columns of a matrix each.

    Args:
        a: rows.
        a_scales: theirs.
        w: matrices, one below the other.
        w_scales: theirs.
        source: (BLOCK_M,) int64 rows of `a`.
        first: row of `w` that is the first column of the first product.
        second: the same of the second product.
        size_k: K.
        BLOCK_M: rows.
        BLOCK_N: 256 to read the rows once for both products, 128 for one after the other.
    """
    if BLOCK_N == BLOCK:
        left = _product(a, a_scales, w, w_scales, source, first, size_k, BLOCK_M)
        right = _product(a, a_scales, w, w_scales, source, second, size_k, BLOCK_M)
    else:
        left, right = _both_products(
            a, a_scales, w, w_scales, source, first, second, size_k, BLOCK_M
        )
    return left, right


@triton.jit
def _product(a, a_scales, w, w_scales, source, first, size_k, BLOCK_M: tl.constexpr):
    k = tl.arange(0, BLOCK)
    num_k = size_k // BLOCK
    a_ptrs = a + source[:, None] * size_k + k[None, :]
    a_scales += source * num_k
    w_scales += first // BLOCK * num_k
    a_scale, w_scale = tl.load(a_scales), tl.load(w_scales)
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for block in range(num_k):
        a_tile = tl.load(a_ptrs)
        w_tile = w.load([first, block * BLOCK]).T
        product = tl.dot(a_tile, w_tile, tl.zeros((BLOCK_M, BLOCK), tl.float32))
        acc += product * (a_scale * w_scale)[:, None]
        a_ptrs += BLOCK
        # Scales are loaded a step ahead, to be there when the product is.
        ahead = tl.minimum(block + 1, num_k - 1)
        a_scale, w_scale = tl.load(a_scales + ahead), tl.load(w_scales + ahead)
    return acc


@triton.jit
def _both_products(a, a_scales, w, w_scales, source, first, second, size_k, BLOCK_M: tl.constexpr):
    k = tl.arange(0, BLOCK)
    num_k = size_k // BLOCK
    a_ptrs = a + source[:, None] * size_k + k[None, :]
    a_scales += source * num_k
    first_scales = w_scales + first // BLOCK * num_k
    second_scales = w_scales + second // BLOCK * num_k
    a_scale = tl.load(a_scales)
    first_scale, second_scale = tl.load(first_scales), tl.load(second_scales)
    left = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for block in range(num_k):
        a_tile = tl.load(a_ptrs)
        w_tile = w.load([first, block * BLOCK]).T
        product = tl.dot(a_tile, w_tile, tl.zeros((BLOCK_M, BLOCK), tl.float32))
        left += product * (a_scale * first_scale)[:, None]
        w_tile = w.load([second, block * BLOCK]).T
        product = tl.dot(a_tile, w_tile, tl.zeros((BLOCK_M, BLOCK), tl.float32))
        right += product * (a_scale * second_scale)[:, None]
        a_ptrs += BLOCK
        ahead = tl.minimum(block + 1, num_k - 1)
        a_scale = tl.load(a_scales + ahead)
        first_scale, second_scale = tl.load(first_scales + ahead), tl.load(second_scales + ahead)
    return left, right


@triton.jit
def _gemm_tile(
    a,
    a_scales,
    w,
    w_scales,
    y,
    expert,
    row,
    end,
    col,
    size_n,
    size_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = row + tl.arange(0, BLOCK_M)
    # Rows past the end repeat a good one, a block past the last that; they are not stored.
    source = tl.where(rows < end, rows, row).to(tl.int64)
    first = expert * size_n + col
    second = expert * size_n + tl.minimum(col + BLOCK, size_n - BLOCK)
    left, right = products(
        a, a_scales, w, w_scales, source, first, second, size_k, BLOCK_M, BLOCK_N
    )
    mask = (rows < end)[:, None]
    y_ptrs = y + rows.to(tl.int64)[:, None] * size_n + (col + tl.arange(0, BLOCK))[None, :]
    tl.store(y_ptrs, rounded(left, y.dtype.element_ty), mask=mask)
    if col + BLOCK < size_n:
        tl.store(y_ptrs + BLOCK, rounded(right, y.dtype.element_ty), mask=mask)


@triton.jit
def gemm_kernel(
    a,
    a_scales,
    w,
    w_scales,
    y,
    table,
    offsets,
    num_experts,
    bound,
    size_n,
    size_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile; one of at most half the rows is computed at half the height."""
    num_n = tl.cdiv(size_n, 2 * BLOCK)
    total = tl.load(offsets + num_experts + 1) * num_n
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, n, small = tile_at(
            tile, table, offsets, num_experts, bound, num_n, BLOCK_M, GROUP_M
        )
        for HALVED in tl.static_range(2):
            if small == HALVED:
                _gemm_tile(
                    a,
                    a_scales,
                    w,
                    w_scales,
                    y,
                    expert,
                    row,
                    end,
                    n * 2 * BLOCK,
                    size_n,
                    size_k,
                    BLOCK_M // (1 + HALVED),
                    BLOCK_N,
                )
