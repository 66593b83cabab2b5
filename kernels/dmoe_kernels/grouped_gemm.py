"""Grouped GEMM over rows sorted by expert, and its weight gradient; persistent, no host wait.

Rows may be read through an index. Shapes: R routed rows, E experts, and M, N, K of a product; with
`tiles` from `tiles.tile_rows`, a program takes tiles until the table's own length is reached.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import dot, num_programs, precision_of, rounded, swizzled
from dmoe_kernels.configs import Config, choose, rows_bucket, scaled_k
from dmoe_kernels.tiles import Tiles, tile_rows
from dmoe_kernels.tma import gemm_by_tma


def grouped_gemm(
    a_RK: Tensor,
    w: Tensor,
    counts_E: Tensor,
    *,
    transposed: bool,
    num_rows: int,
    index_R: Tensor | None = None,
    config: Config | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Multiply each expert's rows with its matrix.

    Args:
        a_RK: rows, sorted by expert; with `index_R` the sources that it reads rows from.
        w: (E, N, K) if `transposed`, else (E, K, N), in the rows' dtype.
        counts_E: (E,) int64 rows of each expert.
        transposed: which dim of `w` is summed.
        num_rows: R; rows past the sum of the counts are left as they are.
        index_R: (R,) int64 source of each row, or None.
        config: of the kernel; chosen if None.
        tiles: of `config.block_m` rows, if they were made before.

    Returns:
        (R, N) in the rows' dtype, summed in float32.
    """
    num_experts, size_k = len(w), a_RK.shape[1]
    size_n = w.shape[1] if transposed else w.shape[2]
    shape = (size_n, size_k, num_experts, rows_bucket(num_rows, num_experts))
    config = config or choose("gemm", a_RK.dtype, shape, a_RK.device)
    if tiles is None or tiles.block_m != config.block_m:
        tiles = tile_rows(counts_E, num_rows, config.block_m)
    y_RN = a_RK.new_empty(num_rows, size_n)
    if config.tma:
        assert index_R is None, "TMA reads rows that lie one after the other"
        gemm_by_tma(a_RK, w, y_RN, tiles, transposed=transposed, config=config)
        return y_RN
    block_k = scaled_k(config, a_RK.itemsize)
    most = tiles.table_3M.shape[1] * triton.cdiv(size_n, config.block_n)
    gemm_kernel[(num_programs(a_RK.device, most),)](
        a_RK,
        w,
        y_RN,
        a_RK if index_R is None else index_R,
        tiles.table_3M,
        tiles.offsets,
        num_experts,
        tiles.table_3M.shape[1],
        size_n,
        size_k,
        GATHER=index_R is not None,
        TRANSPOSED=transposed,
        EVEN_K=size_k % block_k == 0,
        PRECISION=precision_of(a_RK.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y_RN


def grouped_outer(
    a_RM: Tensor,
    b_RN: Tensor,
    offsets: Tensor,
    *,
    num_rows: int,
    dtype: torch.dtype,
    a_index_R: Tensor | None = None,
    b_index_R: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return (E, M, N) in `dtype`: a^T b over the rows of each expert, zero where it has none.

    Args:
        a_RM: rows, sorted by expert; with `a_index_R` the sources that it reads rows from.
        b_RN: as `a_RM`.
        offsets: of `Tiles`.
        num_rows: R, from which the tile shape is chosen.
        dtype: of the result; summed in float32.
        a_index_R: (R,) int64 source of each row of a, or None.
        b_index_R: as `a_index_R`, of b.
        out: (E, M, N) to add to, such as a gradient of all micro-batches; a new one if None.
        config: of the kernel; chosen if None.
    """
    num_experts, size_m, size_n = len(offsets) - 2, a_RM.shape[1], b_RN.shape[1]
    shape = (size_m, size_n, num_experts, rows_bucket(num_rows, num_experts))
    accumulate = out is not None
    kernel = "outer_add" if accumulate else "outer"
    config = config or choose(kernel, a_RM.dtype, shape, a_RM.device)
    if out is None:
        out = a_RM.new_empty(num_experts, size_m, size_n, dtype=dtype)
    tiles_m, tiles_n = triton.cdiv(size_m, config.block_m), triton.cdiv(size_n, config.block_n)
    outer_kernel[(num_programs(a_RM.device, num_experts * tiles_m * tiles_n),)](
        a_RM,
        b_RN,
        out,
        offsets if a_index_R is None else a_index_R,
        offsets if b_index_R is None else b_index_R,
        offsets,
        num_experts,
        size_m,
        size_n,
        A_GATHER=a_index_R is not None,
        B_GATHER=b_index_R is not None,
        ACCUMULATE=accumulate,
        PRECISION=precision_of(a_RM.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=scaled_k(config, a_RM.itemsize),
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


@triton.jit
def product(
    a,
    w,
    index,
    row,
    end,
    col,
    size_n,
    size_k,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the float32 (BLOCK_M, BLOCK_N) product of the rows from `row` on with one matrix."""
    rows = row + tl.arange(0, BLOCK_M)
    # Rows past the end repeat a good one; they are not stored.
    rows = tl.where(rows < end, rows, row)
    cols = col + tl.arange(0, BLOCK_N)
    inside = (cols < size_n)[None, :]
    source = tl.load(index + rows) if GATHER else rows
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a + source.to(tl.int64)[:, None] * size_k + k[None, :]
    if TRANSPOSED:
        w_ptrs = w + cols[None, :] * size_k + k[:, None]
    else:
        w_ptrs = w + k[:, None] * size_n + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, size_k, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_ptrs)
            w_tile = tl.load(w_ptrs, mask=inside, other=0.0)
        else:
            a_tile = tl.load(a_ptrs, mask=k[None, :] < size_k - k0, other=0.0)
            w_tile = tl.load(w_ptrs, mask=inside & (k[:, None] < size_k - k0), other=0.0)
        acc = dot(a_tile, w_tile, acc, PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K if TRANSPOSED else BLOCK_K * size_n
    return acc


@triton.jit
def _gemm_tile(
    a,
    w,
    y,
    index,
    row,
    end,
    col,
    size_n,
    size_k,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = product(
        a,
        w,
        index,
        row,
        end,
        col,
        size_n,
        size_k,
        GATHER,
        TRANSPOSED,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    y_ptrs = y + rows.to(tl.int64)[:, None] * size_n + cols[None, :]
    mask = (rows < end)[:, None] & (cols < size_n)[None, :]
    tl.store(y_ptrs, rounded(acc, y.dtype.element_ty), mask=mask)


@triton.jit
def gemm_kernel(
    a,
    w,
    y,
    index,
    table,
    offsets,
    num_experts,
    bound,
    size_n,
    size_k,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile; one of at most half the rows is computed at half the height."""
    num_m = tl.load(offsets + num_experts + 1)
    num_n = tl.cdiv(size_n, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = swizzled(tile, num_m, num_n, GROUP_M)
        expert = tl.load(table + m).to(tl.int64)
        row = tl.load(table + bound + m)
        end = tl.load(table + 2 * bound + m)
        w_expert = w + expert * size_n * size_k
        small = (end - row <= BLOCK_M // 2).to(tl.int32)
        for HALVED in tl.static_range(2):
            if small == HALVED:
                _gemm_tile(
                    a,
                    w_expert,
                    y,
                    index,
                    row,
                    end,
                    n * BLOCK_N,
                    size_n,
                    size_k,
                    GATHER,
                    TRANSPOSED,
                    EVEN_K,
                    PRECISION,
                    BLOCK_M // (1 + HALVED),
                    BLOCK_N,
                    BLOCK_K,
                )


@triton.jit
def outer_kernel(
    a,
    b,
    out,
    a_index,
    b_index,
    offsets,
    num_experts,
    size_m,
    size_n,
    A_GATHER: tl.constexpr,
    B_GATHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile of all experts' (M, N); the rows of the expert are summed."""
    num_m, num_n = tl.cdiv(size_m, BLOCK_M), tl.cdiv(size_n, BLOCK_N)
    for tile in range(tl.program_id(0), num_experts * num_m * num_n, tl.num_programs(0)):
        expert = tile // (num_m * num_n)
        m, n = swizzled(tile % (num_m * num_n), num_m, num_n, GROUP_M)
        begin = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        rows_m = m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_m, inside_n = (rows_m < size_m)[None, :], (cols_n < size_n)[None, :]
        out_ptrs = out + expert.to(tl.int64) * size_m * size_n
        out_ptrs += rows_m.to(tl.int64)[:, None] * size_n + cols_n[None, :]
        mask = (rows_m < size_m)[:, None] & inside_n
        if ACCUMULATE:
            acc = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Sources are loaded a step ahead: an address that waits for a load cannot be pipelined.
        rows = begin + tl.arange(0, BLOCK_K)
        a_rows = tl.load(a_index + rows, mask=rows < end, other=0) if A_GATHER else rows
        b_rows = tl.load(b_index + rows, mask=rows < end, other=0) if B_GATHER else rows
        for row in range(begin, end, BLOCK_K):
            rows = row + tl.arange(0, BLOCK_K)
            inside = rows < end
            a_ptrs = a + a_rows.to(tl.int64)[:, None] * size_m + rows_m[None, :]
            b_ptrs = b + b_rows.to(tl.int64)[:, None] * size_n + cols_n[None, :]
            a_tile = tl.load(a_ptrs, mask=inside[:, None] & inside_m, other=0.0)
            b_tile = tl.load(b_ptrs, mask=inside[:, None] & inside_n, other=0.0)
            acc = dot(tl.trans(a_tile), b_tile, acc, PRECISION)
            rows += BLOCK_K
            a_rows = tl.load(a_index + rows, mask=rows < end, other=0) if A_GATHER else rows
            b_rows = tl.load(b_index + rows, mask=rows < end, other=0) if B_GATHER else rows
        tl.store(out_ptrs, rounded(acc, out.dtype.element_ty), mask=mask)
