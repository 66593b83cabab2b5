"""Up: gather, grouped GEMM and activation in one persistent kernel; x is read through the index.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else F.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels import gluon_up
from dmoe_kernels.common import (
    by_eights,
    in_eights,
    num_programs,
    precision_of,
    rounded,
    swiglu,
    ungated,
)
from dmoe_kernels.configs import Config, choose, is_even, rows_bucket, scaled_k
from dmoe_kernels.gluon_up import suits_gluon
from dmoe_kernels.product import halves, product, tile_at
from dmoe_kernels.tiles import Tiles, tile_rows
from dmoe_kernels.tma import matrix_descriptor, suits_tma


def up(
    x_ND: Tensor,
    index_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EHD: Tensor,
    activation: str,
    config: Config | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return z_RH = W_up x of each routed row, and a_RF = s act(z)."""
    (num_experts, size_h, dim), num_rows = w_up_EHD.shape, len(index_R)
    parts = 2 if activation == "swiglu" else 1
    ffn_dim = size_h // parts
    if config is None:
        shape = (ffn_dim, dim, num_experts, rows_bucket(num_rows, num_experts))
        gluon = activation == "swiglu" and suits_gluon(x_ND, w_up_EHD)
        tma = suits_tma(w_up_EHD)
        inputs = (x_ND, index_R, weights_R, counts_E, w_up_EHD, activation)
        run = functools.partial(up, *inputs, tiles=tiles)
        config = choose(
            "up",
            activation,
            x_ND.dtype,
            shape,
            x_ND.device,
            run,
            tma=tma,
            gluon=gluon,
            even=is_even(dim, ffn_dim),
        )
    if config.gluon:
        assert activation == "swiglu"
        return gluon_up.up(x_ND, index_R, weights_R, counts_E, w_up_EHD, config, tiles)
    if tiles is None or tiles.block_m != config.block_m:
        tiles = tile_rows(counts_E, num_rows, config.block_m)
    z_RH, a_RF = x_ND.new_empty(num_rows, size_h), x_ND.new_empty(num_rows, ffn_dim)
    block_n, block_k = config.block_n, scaled_k(config, x_ND.itemsize)
    w = w_up_EHD
    if config.tma:
        w = matrix_descriptor(w_up_EHD, block_n, block_k, transposed=True, parts=parts)
    most = tiles.table_3M.shape[1] * triton.cdiv(ffn_dim, block_n // parts)
    up_kernel[(num_programs(x_ND.device, most),)](
        x_ND,
        w,
        weights_R,
        z_RH,
        a_RF,
        index_R,
        tiles.table_3M,
        tiles.offsets,
        num_experts,
        tiles.table_3M.shape[1],
        ffn_dim,
        dim,
        ACTIVATION=activation,
        TMA=config.tma,
        EVEN_K=dim % block_k == 0,
        EIGHTS=by_eights(ffn_dim, dim),
        PRECISION=precision_of(x_ND.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return z_RH, a_RF


@triton.jit
def _up_tile(
    x,
    w,
    weights,
    z,
    a,
    index,
    expert,
    row,
    end,
    col,
    ffn_dim,
    dim,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    acc = product(
        x,
        w,
        index,
        expert,
        row,
        end,
        col,
        ffn_dim,
        dim,
        True,
        True,
        PARTS,
        False,
        TMA,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N // PARTS)
    mask = (rows < end)[:, None] & (cols < ffn_dim)[None, :]
    weight = tl.load(weights + rows, mask=rows < end, other=0.0).to(tl.float32)
    rows = rows.to(tl.int64)
    z_ptrs = z + rows[:, None] * (PARTS * ffn_dim) + cols[None, :]
    # Backward starts from the rounded numbers, so the activation does, too.
    if ACTIVATION == "swiglu":
        gate, up_ = halves(acc, BLOCK_M, BLOCK_N)
        gate = rounded(gate, z.dtype.element_ty)
        up_ = rounded(up_, z.dtype.element_ty)
        tl.store(z_ptrs, gate, mask=mask)
        tl.store(z_ptrs + ffn_dim, up_, mask=mask)
        hidden = swiglu(gate.to(tl.float32), up_.to(tl.float32))
    else:
        pre = rounded(acc, z.dtype.element_ty)
        tl.store(z_ptrs, pre, mask=mask)
        hidden, _ = ungated(pre.to(tl.float32), ACTIVATION)
    a_ptrs = a + rows[:, None] * ffn_dim + cols[None, :]
    tl.store(a_ptrs, rounded(hidden * weight[:, None], a.dtype.element_ty), mask=mask)


@triton.jit
def up_kernel(
    x,
    w,
    weights,
    z,
    a,
    index,
    table,
    offsets,
    num_experts,
    bound,
    ffn_dim,
    dim,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile; one of at most half the rows is computed at half the height."""
    ffn_dim, dim = in_eights(ffn_dim, EIGHTS), in_eights(dim, EIGHTS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if ACTIVATION == "swiglu" else BLOCK_N
    num_n = tl.cdiv(ffn_dim, WIDTH)
    total = tl.load(offsets + num_experts + 1) * num_n
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, n, small = tile_at(
            tile, table, offsets, num_experts, bound, num_n, BLOCK_M, GROUP_M
        )
        for HALVED in tl.static_range(2):
            if small == HALVED:
                _up_tile(
                    x,
                    w,
                    weights,
                    z,
                    a,
                    index,
                    expert,
                    row,
                    end,
                    n * WIDTH,
                    ffn_dim,
                    dim,
                    ACTIVATION,
                    TMA,
                    EVEN_K,
                    PRECISION,
                    BLOCK_M // (1 + HALVED),
                    BLOCK_N,
                    BLOCK_K,
                )
