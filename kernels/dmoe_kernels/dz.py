"""dZ: gather, grouped GEMM dY W_down, and in its epilogue the backward of activation and gate.

The epilogue makes dZ, A again, and each gate's gradient <dY W_down, act(Z)>, so that no output row
is kept for it. Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if
gated, else F.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import (
    by_eights,
    in_eights,
    num_programs,
    precision_of,
    rounded,
    ungated,
)
from dmoe_kernels.configs import ROWS_READ_PAST, Config, choose, is_even, rows_bucket, scaled_k
from dmoe_kernels.product import halves, product, tile_at
from dmoe_kernels.tiles import Tiles, tile_rows


def dz(
    dy_ND: Tensor,
    index_R: Tensor,
    z_RH: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    config: Config | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz_RH, a_RF = s act(z), and the gates' gradients dweights_R in their dtype.

    Past the last row of all experts some rows are zero, as `grouped_outer` asks; the others there
    are left as they are.
    """
    (num_experts, dim, ffn_dim), num_rows = w_down_EDF.shape, len(index_R)
    if config is None:
        shape = (ffn_dim, dim, num_experts, rows_bucket(num_rows, num_experts))
        inputs = (dy_ND, index_R, z_RH, weights_R, counts_E, w_down_EDF, activation)
        run = functools.partial(dz, *inputs, tiles=tiles)
        config = choose(
            "dz", activation, dy_ND.dtype, shape, dy_ND.device, run, even=is_even(dim, ffn_dim)
        )
    if tiles is None or tiles.block_m != config.block_m:
        tiles = tile_rows(counts_E, num_rows, config.block_m)
    dz_RH, a_RF = torch.empty_like(z_RH), z_RH.new_empty(num_rows, ffn_dim)
    num_n = triton.cdiv(ffn_dim, config.block_n)
    # Each tile of columns has a part of a gate's gradient: no atomics. Rows in no tile keep zero.
    parts = weights_R.new_zeros(num_n, num_rows)
    block_k = scaled_k(config, dy_ND.itemsize)
    most = tiles.table_3M.shape[1] * num_n
    dz_kernel[(num_programs(dy_ND.device, most),)](
        dy_ND,
        w_down_EDF,
        weights_R,
        z_RH,
        dz_RH,
        a_RF,
        parts,
        index_R,
        tiles.table_3M,
        tiles.offsets,
        num_experts,
        tiles.table_3M.shape[1],
        num_rows,
        ffn_dim,
        dim,
        ACTIVATION=activation,
        EVEN_K=dim % block_k == 0,
        EIGHTS=by_eights(ffn_dim, dim),
        PRECISION=precision_of(dy_ND.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dz_RH, a_RF, parts.sum(0)


@triton.jit
def _dz_columns(
    da,
    weight,
    z,
    dz_,
    a,
    rows,
    inside,
    cols,
    ffn_dim,
    ACTIVATION: tl.constexpr,
):
    """Store dz and a of some columns; return each row's sum of da act(z) over them."""
    mask = inside[:, None] & (cols < ffn_dim)[None, :]
    rows = rows.to(tl.int64)[:, None]
    dtype: tl.constexpr = z.dtype.element_ty
    if ACTIVATION == "swiglu":
        place = rows * (2 * ffn_dim) + cols[None, :]
        gate = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
        up_ = tl.load(z + place + ffn_dim, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up_
        part = tl.sum(tl.where(mask, da * hidden, 0.0), 1)
        da = da * weight[:, None]
        dgate = da * up_ * (sigmoid + silu * (1 - sigmoid))
        tl.store(dz_ + place, rounded(dgate, dtype), mask=mask)
        tl.store(dz_ + place + ffn_dim, rounded(da * silu, dtype), mask=mask)
    else:
        place = rows * ffn_dim + cols[None, :]
        pre = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
        hidden, slope = ungated(pre, ACTIVATION)
        part = tl.sum(tl.where(mask, da * hidden, 0.0), 1)
        tl.store(dz_ + place, rounded(da * weight[:, None] * slope, dtype), mask=mask)
    a_ptrs = a + rows * ffn_dim + cols[None, :]
    tl.store(a_ptrs, rounded(hidden * weight[:, None], dtype), mask=mask)
    return part


@triton.jit
def _dz_tile(
    dy,
    w,
    weights,
    z,
    dz_,
    a,
    parts,
    index,
    expert,
    row,
    end,
    col,
    ffn_dim,
    dim,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = product(
        dy,
        w,
        index,
        expert,
        row,
        end,
        col,
        ffn_dim,
        dim,
        True,
        False,
        1,
        False,
        False,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < end
    weight = tl.load(weights + rows, mask=inside, other=0.0).to(tl.float32)
    # Two halves, one after the other: with all columns at once the epilogue spills registers.
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    cols = col + tl.arange(0, BLOCK_N // 2)
    part = _dz_columns(left, weight, z, dz_, a, rows, inside, cols, ffn_dim, ACTIVATION)
    cols += BLOCK_N // 2
    part += _dz_columns(right, weight, z, dz_, a, rows, inside, cols, ffn_dim, ACTIVATION)
    tl.store(parts + rows, part, mask=inside)


@triton.jit
def dz_kernel(
    dy,
    w,
    weights,
    z,
    dz_,
    a,
    parts,
    index,
    table,
    offsets,
    num_experts,
    bound,
    num_rows,
    ffn_dim,
    dim,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile of dY W_down, with the backward of the activation in the epilogue."""
    ffn_dim, dim = in_eights(ffn_dim, EIGHTS), in_eights(dim, EIGHTS)
    SIZE: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    _zero_rows(dz_, offsets, num_experts, num_rows, SIZE * ffn_dim)
    _zero_rows(a, offsets, num_experts, num_rows, ffn_dim)
    num_n = tl.cdiv(ffn_dim, BLOCK_N)
    total = tl.load(offsets + num_experts + 1) * num_n
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, n, small = tile_at(
            tile, table, offsets, num_experts, bound, num_n, BLOCK_M, GROUP_M
        )
        for HALVED in tl.static_range(2):
            if small == HALVED:
                _dz_tile(
                    dy,
                    w,
                    weights,
                    z,
                    dz_,
                    a,
                    parts + n.to(tl.int64) * num_rows,
                    index,
                    expert,
                    row,
                    end,
                    n * BLOCK_N,
                    ffn_dim,
                    dim,
                    ACTIVATION,
                    EVEN_K,
                    PRECISION,
                    BLOCK_M // (1 + HALVED),
                    BLOCK_N,
                    BLOCK_K,
                )


_PAST = tl.constexpr(ROWS_READ_PAST)


@triton.jit
def _zero_rows(x, offsets, num_experts, num_rows, width):
    """Write zeros to the rows after those of all experts, as many as a product may read of them."""
    rows = tl.load(offsets + num_experts) + tl.arange(0, _PAST)
    place = x + rows.to(tl.int64)[:, None] * width
    for col in range(tl.program_id(0) * 16, width, tl.num_programs(0) * 16):
        cols = col + tl.arange(0, 16)
        mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
        tl.store(place + cols[None, :], tl.zeros((_PAST, 16), x.dtype.element_ty), mask=mask)
