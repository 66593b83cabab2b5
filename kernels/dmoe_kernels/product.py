"""What all grouped GEMMs share: the tiles a program takes, and the product of one tile.

Rows come by address, also through an index, or by TMA; so does the matrix. Shapes: M rows and N
columns of a tile, K summed.
"""

import triton
import triton.language as tl

from dmoe_kernels.common import dot, swizzled


@triton.jit
def tile_at(
    tile, table, offsets, num_experts, bound, num_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr
):
    """Return expert, first row, end of the expert's rows and block of columns of a tile.

    The last number is 1 where at most half of the rows are there.
    """
    m, n = swizzled(tile, tl.load(offsets + num_experts + 1), num_n, GROUP_M)
    row, end = tl.load(table + bound + m), tl.load(table + 2 * bound + m)
    return tl.load(table + m), row, end, n, (end - row <= BLOCK_M // 2).to(tl.int32)


@triton.jit
def product(
    a,
    w,
    index,
    expert,
    row,
    end,
    col,
    size_n,
    size_k,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the float32 (BLOCK_M, BLOCK_N) product of the rows from `row` on with a matrix.

    With two PARTS, columns are those from `col` on of the matrix's first half, then those of its
    second: of one product, as a tensor core reads its left side once for all columns. `size_n` is
    the width of a part.
    """
    k = tl.arange(0, BLOCK_K)
    if not A_TMA:
        rows = row + tl.arange(0, BLOCK_M)
        # Rows past the end repeat a good one; they are not stored.
        rows = tl.where(rows < end, rows, row)
        source = tl.load(index + rows) if GATHER else rows
        a_ptrs = a + source.to(tl.int64)[:, None] * size_k + k[None, :]
    if not W_TMA:
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        column = tl.arange(0, BLOCK_N)
        inside = (col + column % WIDTH < size_n)[None, :]
        column = col + column % WIDTH + column // WIDTH * size_n
        w += expert.to(tl.int64) * (PARTS * size_n * size_k)
        if TRANSPOSED:
            w_ptrs = w + column[None, :] * size_k + k[:, None]
        else:
            w_ptrs = w + k[:, None] * size_n + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, size_k, BLOCK_K):
        if A_TMA:
            a_tile = a.load([row, k0])
        else:
            if EVEN_K:
                a_tile = tl.load(a_ptrs)
            else:
                a_tile = tl.load(a_ptrs, mask=k[None, :] < size_k - k0, other=0.0)
            a_ptrs += BLOCK_K
        if W_TMA:
            if TRANSPOSED:
                w_tile = w.load([expert * PARTS, col, k0]).reshape(BLOCK_N, BLOCK_K).T
            else:
                w_tile = w.load([expert, k0, col]).reshape(BLOCK_K, BLOCK_N)
        else:
            if EVEN_K:
                w_tile = tl.load(w_ptrs, mask=inside, other=0.0)
            else:
                w_tile = tl.load(w_ptrs, mask=inside & (k[:, None] < size_k - k0), other=0.0)
            w_ptrs += BLOCK_K if TRANSPOSED else BLOCK_K * size_n
        acc = dot(a_tile, w_tile, acc, PRECISION)
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and the right half of the columns."""
    split = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    return tl.split(split)
