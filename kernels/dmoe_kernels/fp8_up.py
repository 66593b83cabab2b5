"""Up in eight bits: gather, grouped GEMM, activation, and A quantised, in one persistent kernel.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else F; D
and F are multiples of 128.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import num_programs, rounded, swiglu, ungated
from dmoe_kernels.configs import Config, choose, name_of, rows_bucket
from dmoe_kernels.fp8 import BLOCK, Quantized, quantize_rows, quantize_weights, quantized
from dmoe_kernels.fp8_gemm import matrix_rows, products
from dmoe_kernels.product import tile_at
from dmoe_kernels.tiles import Tiles, tile_rows


def kernel_for(itemsize: int) -> str:
    """Return the key of `CANDIDATES` for rows of such elements."""
    return "up_fp8_wide" if itemsize == 4 else "up_fp8"


def up(
    x_ND: Tensor,
    index_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EHD: Tensor,
    activation: str,
    config: Config | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Quantized]:
    """Return z_RH = W_up x of each routed row in x's dtype, and a_RF = s act(z), quantised."""
    (num_experts, size_h, dim), num_rows = w_up_EHD.shape, len(index_R)
    ffn_dim = size_h // 2 if activation == "swiglu" else size_h
    if config is None:
        shape = (ffn_dim, dim, num_experts, rows_bucket(num_rows, num_experts))
        inputs = (x_ND, index_R, weights_R, counts_E, w_up_EHD, activation)
        run = functools.partial(up, *inputs, tiles=tiles)
        form = f"{activation} {name_of(x_ND.dtype)}"
        config = choose(
            kernel_for(x_ND.itemsize), form, torch.float8_e4m3fn, shape, index_R.device, run
        )
    if tiles is None or tiles.block_m != config.block_m:
        tiles = tile_rows(counts_E, num_rows, config.block_m)
    w = quantize_weights(w_up_EHD)
    z_RH = x_ND.new_empty(num_rows, size_h)
    a_RF = Quantized(
        x_ND.new_empty(num_rows, ffn_dim, dtype=torch.float8_e4m3fn),
        x_ND.new_empty(num_rows, ffn_dim // BLOCK.value, dtype=torch.float32),
    )
    most = tiles.table_3M.shape[1] * triton.cdiv(size_h, 2 * BLOCK.value)
    up_kernel[(num_programs(index_R.device, most),)](
        *quantize_rows(x_ND),
        matrix_rows(w),
        w.scales,
        weights_R,
        z_RH,
        *a_RF,
        index_R,
        tiles.table_3M,
        tiles.offsets,
        num_experts,
        tiles.table_3M.shape[1],
        size_h,
        dim,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return z_RH, a_RF


@triton.jit
def _store_quantized(hidden, numbers, scales, rows, mask, block, ffn_dim):
    """Quantise 128 columns of rows and store them and their scales."""
    code, scale = quantized(hidden, tl.max(tl.abs(hidden), 1)[:, None])
    cols = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(numbers + rows[:, None] * ffn_dim + cols[None, :], code, mask=mask)
    tl.store(scales + (rows * (ffn_dim // BLOCK) + block)[:, None], scale, mask=mask)


@triton.jit
def _plain_columns(
    acc, weight, z, a, a_scales, rows, mask, block, ffn_dim, ACTIVATION: tl.constexpr
):
    """Store z and a of 128 columns, of experts that are not gated."""
    dtype: tl.constexpr = z.dtype.element_ty
    pre = rounded(acc, dtype)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + rows[:, None] * ffn_dim + cols[None, :], pre, mask=mask)
    # Backward starts from the rounded numbers, so the activation does, too.
    hidden, _ = ungated(pre.to(tl.float32), ACTIVATION)
    hidden = rounded(hidden * weight[:, None], dtype).to(tl.float32)
    _store_quantized(hidden, a, a_scales, rows, mask, block, ffn_dim)


@triton.jit
def _up_tile(
    x,
    x_scales,
    w,
    w_scales,
    weights,
    z,
    a,
    a_scales,
    index,
    expert,
    row,
    end,
    n,
    size_h,
    dim,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = row + tl.arange(0, BLOCK_M)
    # Rows past the end repeat a good one; they are not stored.
    source = tl.load(index + tl.where(rows < end, rows, row)).to(tl.int64)
    if ACTIVATION == "swiglu":
        ffn_dim = size_h // 2
        col = n * BLOCK
        second = ffn_dim + col
    else:
        ffn_dim = size_h
        col = n * 2 * BLOCK
        second = tl.minimum(col + BLOCK, size_h - BLOCK)
    first, second = expert * size_h + col, expert * size_h + second
    left, right = products(x, x_scales, w, w_scales, source, first, second, dim, BLOCK_M, BLOCK_N)
    dtype: tl.constexpr = z.dtype.element_ty
    mask = (rows < end)[:, None]
    weight = tl.load(weights + rows, mask=rows < end, other=0.0).to(tl.float32)
    rows = rows.to(tl.int64)
    if ACTIVATION == "swiglu":
        gate, up_ = rounded(left, dtype), rounded(right, dtype)
        z_ptrs = z + rows[:, None] * size_h + (col + tl.arange(0, BLOCK))[None, :]
        tl.store(z_ptrs, gate, mask=mask)
        tl.store(z_ptrs + ffn_dim, up_, mask=mask)
        hidden = swiglu(gate.to(tl.float32), up_.to(tl.float32))
        hidden = rounded(hidden * weight[:, None], dtype).to(tl.float32)
        _store_quantized(hidden, a, a_scales, rows, mask, n, ffn_dim)
    else:
        _plain_columns(left, weight, z, a, a_scales, rows, mask, 2 * n, ffn_dim, ACTIVATION)
        if col + BLOCK < size_h:
            block = 2 * n + 1
            _plain_columns(right, weight, z, a, a_scales, rows, mask, block, ffn_dim, ACTIVATION)


@triton.jit
def up_kernel(
    x,
    x_scales,
    w,
    w_scales,
    weights,
    z,
    a,
    a_scales,
    index,
    table,
    offsets,
    num_experts,
    bound,
    size_h,
    dim,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile; one of at most half the rows is computed at half the height."""
    num_n = tl.cdiv(size_h, 2 * BLOCK)
    total = tl.load(offsets + num_experts + 1) * num_n
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, n, small = tile_at(
            tile, table, offsets, num_experts, bound, num_n, BLOCK_M, GROUP_M
        )
        for HALVED in tl.static_range(2):
            if small == HALVED:
                _up_tile(
                    x,
                    x_scales,
                    w,
                    w_scales,
                    weights,
                    z,
                    a,
                    a_scales,
                    index,
                    expert,
                    row,
                    end,
                    n,
                    size_h,
                    dim,
                    ACTIVATION,
                    BLOCK_M // (1 + HALVED),
                    BLOCK_N,
                )
