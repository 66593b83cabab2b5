"""Grouped GEMM over rows sorted by expert, and its weight gradient; persistent, no host wait.

Rows may be read through an index; on sm_90 what lies in order is loaded by TMA. Shapes: R routed
rows, E experts, and M, N, K of a product; with `tiles` from `tiles.tile_rows`, a program takes
tiles until the table's own length is reached.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels import gluon_outer, gluon_up
from dmoe_kernels.common import (
    by_eights,
    dot,
    in_eights,
    num_programs,
    precision_of,
    rounded,
    swizzled,
)
from dmoe_kernels.configs import Config, choose, is_even, name_of, rows_bucket, scaled_k
from dmoe_kernels.gluon_outer import suits_gluon_outer
from dmoe_kernels.gluon_up import suits_gluon
from dmoe_kernels.product import product, tile_at
from dmoe_kernels.tiles import Tiles, tile_rows
from dmoe_kernels.tma import matrix_descriptor, rows_descriptor, suits_tma


def grouped_gemm(
    a_RK: Tensor,
    w: Tensor,
    counts_E: Tensor,
    *,
    transposed: bool,
    num_rows: int,
    config: Config | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Multiply each expert's rows with its matrix.

    Args:
        a_RK: rows, sorted by expert.
        w: (E, N, K) if `transposed`, else (E, K, N), in the rows' dtype.
        counts_E: (E,) int64 rows of each expert.
        transposed: which dim of `w` is summed.
        num_rows: R; rows past the sum of the counts are left as they are.
        config: of the kernel; chosen if None.
        tiles: of `config.block_m` rows, if they were made before.

    Returns:
        (R, N) in the rows' dtype, summed in float32.
    """
    num_experts, size_k = len(w), a_RK.shape[1]
    size_n = w.shape[1] if transposed else w.shape[2]
    shape = (size_n, size_k, num_experts, rows_bucket(num_rows, num_experts))
    if config is None:
        options = {"transposed": transposed, "num_rows": num_rows, "tiles": tiles}

        def run(config: Config) -> Tensor:
            return grouped_gemm(a_RK, w, counts_E, **options, config=config)

        tma, gluon = suits_tma(a_RK, w), suits_gluon(a_RK, w, transposed=transposed)
        form = "transposed" if transposed else "plain"
        config = choose(
            "gemm",
            form,
            a_RK.dtype,
            shape,
            a_RK.device,
            run,
            tma=tma,
            gluon=gluon,
            even=is_even(size_k, size_n),
        )
    if tiles is None or tiles.block_m != config.block_m:
        tiles = tile_rows(counts_E, num_rows, config.block_m)
    y_RN = a_RK.new_empty(num_rows, size_n)
    if config.gluon:
        gluon_up.gemm(a_RK, w, y_RN, tiles, transposed=transposed, config=config)
        return y_RN
    block_k = scaled_k(config, a_RK.itemsize)
    a, matrix = a_RK, w
    if config.tma:
        a = rows_descriptor(a_RK, config.block_m, block_k)
        matrix = matrix_descriptor(w, config.block_n, block_k, transposed=transposed)
    most = tiles.table_3M.shape[1] * triton.cdiv(size_n, config.block_n)
    gemm_kernel[(num_programs(a_RK.device, most),)](
        a,
        matrix,
        y_RN,
        tiles.table_3M,
        tiles.offsets,
        num_experts,
        tiles.table_3M.shape[1],
        size_n,
        size_k,
        TRANSPOSED=transposed,
        TMA=config.tma,
        EVEN_K=size_k % block_k == 0,
        EIGHTS=by_eights(size_n, size_k),
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
    index_R: Tensor,
    offsets: Tensor,
    *,
    gather_a: bool,
    dtype: torch.dtype,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return (E, M, N) in `dtype`: a^T b over the rows of each expert, zero where it has none.

    One side lies in order, sorted by expert; of the other, rows are read through the index. By TMA
    up to a block of rows past an expert's last is read of the side in order, and multiplied by
    zero: these must be finite where the rows of all experts end (see `dz`).

    Args:
        a_RM: rows, or with `gather_a` their sources.
        b_RN: sources of rows, or with `gather_a` the rows.
        index_R: (R,) int64 source of each row.
        offsets: of `Tiles`.
        gather_a: which side the index is for.
        dtype: of the result; summed in float32.
        out: (E, M, N) to add to, such as a gradient of all micro-batches; a new one if None.
        config: of the kernel; chosen if None. Its first block is that of the side in order.
    """
    num_experts, size_m, size_n = len(offsets) - 2, a_RM.shape[1], b_RN.shape[1]
    kernel = "outer" if out is None else "outer_add"
    in_order = b_RN if gather_a else a_RM
    if config is None:
        shape = (size_m, size_n, num_experts, rows_bucket(len(index_R), num_experts))
        tma = suits_tma(in_order)
        gluon = out is None and suits_gluon_outer(a_RM, b_RN, dtype)
        options = {"gather_a": gather_a, "dtype": dtype}

        def run(config: Config) -> Tensor:
            # What is measured must not add to the sums.
            scratch = None if out is None else torch.empty_like(out)
            return grouped_outer(
                a_RM, b_RN, index_R, offsets, **options, out=scratch, config=config
            )

        form = f"{'left' if gather_a else 'right'} {name_of(dtype if out is None else out.dtype)}"
        config = choose(kernel, form, a_RM.dtype, shape, a_RM.device, run, tma=tma, gluon=gluon)
    if config.gluon:
        assert out is None
        return gluon_outer.outer(
            a_RM, b_RN, index_R, offsets, gather_a=gather_a, dtype=dtype, config=config
        )
    block_k = scaled_k(config, a_RM.itemsize)
    block_m, block_n = config.block_m, config.block_n
    if gather_a:
        block_m, block_n = block_n, block_m
    # Tiles that share a block in the L2 cache: as many rows of the result, whichever their height.
    group_m = config.group_m * config.block_m // block_m
    a, b = a_RM, b_RN
    if config.tma and gather_a:
        b = rows_descriptor(b_RN, block_k, block_n)
    elif config.tma:
        a = rows_descriptor(a_RM, block_k, block_m)
    accumulate = out is not None
    if out is None:
        out = a_RM.new_empty(num_experts, size_m, size_n, dtype=dtype)
    most = num_experts * triton.cdiv(size_m, block_m) * triton.cdiv(size_n, block_n)
    outer_kernel[(num_programs(a_RM.device, most),)](
        a,
        b,
        out,
        index_R,
        offsets,
        num_experts,
        size_m,
        size_n,
        GATHER_A=gather_a,
        TMA=config.tma,
        ACCUMULATE=accumulate,
        EIGHTS=by_eights(size_m, size_n),
        PRECISION=precision_of(a_RM.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


@triton.jit
def _gemm_tile(
    a,
    w,
    y,
    expert,
    row,
    end,
    col,
    size_n,
    size_k,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = product(
        a,
        w,
        a,
        expert,
        row,
        end,
        col,
        size_n,
        size_k,
        False,
        TRANSPOSED,
        1,
        TMA,
        TMA,
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
    table,
    offsets,
    num_experts,
    bound,
    size_n,
    size_k,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile; one of at most half the rows is computed at half the height.

    By TMA all are of full height, and the loops over tiles and over K are one: the next tile is
    loaded while this one is stored.
    """
    size_n, size_k = in_eights(size_n, EIGHTS), in_eights(size_k, EIGHTS)
    num_n = tl.cdiv(size_n, BLOCK_N)
    total = tl.load(offsets + num_experts + 1) * num_n
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=TMA):
        expert, row, end, n, small = tile_at(
            tile, table, offsets, num_experts, bound, num_n, BLOCK_M, GROUP_M
        )
        for HALVED in tl.static_range(1 if TMA else 2):
            if TMA or small == HALVED:
                _gemm_tile(
                    a,
                    w,
                    y,
                    expert,
                    row,
                    end,
                    n * BLOCK_N,
                    size_n,
                    size_k,
                    TRANSPOSED,
                    TMA,
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
    index,
    offsets,
    num_experts,
    size_m,
    size_n,
    GATHER_A: tl.constexpr,
    TMA: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile of all experts' (M, N); the rows of the expert are summed."""
    size_m, size_n = in_eights(size_m, EIGHTS), in_eights(size_n, EIGHTS)
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
        source = tl.load(index + rows, mask=rows < end, other=0)
        for row in range(begin, end, BLOCK_K):
            rows = row + tl.arange(0, BLOCK_K)
            inside = (rows < end)[:, None]
            if TMA and not GATHER_A:
                a_tile = a.load([row, m * BLOCK_M])
            else:
                a_rows = source if GATHER_A else rows
                a_ptrs = a + a_rows.to(tl.int64)[:, None] * size_m + rows_m[None, :]
                a_tile = tl.load(a_ptrs, mask=inside & inside_m, other=0.0)
            if TMA and GATHER_A:
                b_tile = b.load([row, n * BLOCK_N])
            else:
                b_rows = rows if GATHER_A else source
                b_ptrs = b + b_rows.to(tl.int64)[:, None] * size_n + cols_n[None, :]
                b_tile = tl.load(b_ptrs, mask=inside & inside_n, other=0.0)
            acc = dot(tl.trans(a_tile), b_tile, acc, PRECISION)
            rows += BLOCK_K
            source = tl.load(index + rows, mask=rows < end, other=0)
        tl.store(out_ptrs, rounded(acc, out.dtype.element_ty), mask=mask)
