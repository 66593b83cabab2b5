"""Up: gather, grouped GEMM and activation in one persistent kernel; x is read through the index.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else F.
"""

import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import dot, gelu_tanh, num_programs, precision_of, rounded, swizzled
from dmoe_kernels.configs import Config, choose, rows_bucket, scaled_k
from dmoe_kernels.grouped_gemm import product
from dmoe_kernels.tiles import tile_rows


def up(
    x_ND: Tensor,
    index_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EHD: Tensor,
    activation: str,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Return z_RH = W_up x of each routed row, and a_RF = s act(z)."""
    (num_experts, size_h, dim), num_rows = w_up_EHD.shape, len(index_R)
    ffn_dim = size_h // 2 if activation == "swiglu" else size_h
    shape = (ffn_dim, dim, num_experts, rows_bucket(num_rows, num_experts))
    config = config or choose("up", x_ND.dtype, shape, x_ND.device)
    tiles = tile_rows(counts_E, num_rows, config.block_m)
    z_RH, a_RF = x_ND.new_empty(num_rows, size_h), x_ND.new_empty(num_rows, ffn_dim)
    block_k = scaled_k(config, x_ND.itemsize)
    most = tiles.table_3M.shape[1] * triton.cdiv(ffn_dim, config.block_n)
    up_kernel[(num_programs(x_ND.device, most),)](
        x_ND,
        w_up_EHD,
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
        EVEN_K=dim % block_k == 0,
        PRECISION=precision_of(x_ND.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
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
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None] & (cols < ffn_dim)[None, :]
    weight = tl.load(weights + rows, mask=rows < end, other=0.0).to(tl.float32)
    rows = rows.to(tl.int64)
    a_ptrs = a + rows[:, None] * ffn_dim + cols[None, :]
    if ACTIVATION == "swiglu":
        gate, up_ = _gated_product(
            x, w, index, row, end, col, ffn_dim, dim, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        gate = rounded(gate, z.dtype.element_ty)
        up_ = rounded(up_, z.dtype.element_ty)
        z_ptrs = z + rows[:, None] * (2 * ffn_dim) + cols[None, :]
        tl.store(z_ptrs, gate, mask=mask)
        tl.store(z_ptrs + ffn_dim, up_, mask=mask)
        # Backward starts from the rounded numbers, so the activation does, too.
        gate = gate.to(tl.float32)
        hidden = gate * tl.sigmoid(gate) * up_.to(tl.float32)
    else:
        acc = product(
            x,
            w,
            index,
            row,
            end,
            col,
            ffn_dim,
            dim,
            True,
            True,
            EVEN_K,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        pre = rounded(acc, z.dtype.element_ty)
        tl.store(z + rows[:, None] * ffn_dim + cols[None, :], pre, mask=mask)
        if ACTIVATION == "gelu":
            hidden, _ = gelu_tanh(pre.to(tl.float32))
        else:
            hidden = tl.maximum(pre.to(tl.float32), 0.0)
    tl.store(a_ptrs, rounded(hidden * weight[:, None], a.dtype.element_ty), mask=mask)


@triton.jit
def _gated_product(
    x,
    w,
    index,
    row,
    end,
    col,
    ffn_dim,
    dim,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the products with the gate rows and the up rows of one expert's matrix."""
    rows = row + tl.arange(0, BLOCK_M)
    rows = tl.where(rows < end, rows, row)
    cols = col + tl.arange(0, BLOCK_N)
    inside = (cols < ffn_dim)[None, :]
    source = tl.load(index + rows).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + source[:, None] * dim + k[None, :]
    gate_ptrs = w + cols[None, :] * dim + k[:, None]
    up_ptrs = gate_ptrs + ffn_dim * dim
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_ = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, dim, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x_ptrs)
            gate_tile = tl.load(gate_ptrs, mask=inside, other=0.0)
            up_tile = tl.load(up_ptrs, mask=inside, other=0.0)
        else:
            left = dim - k0
            x_tile = tl.load(x_ptrs, mask=k[None, :] < left, other=0.0)
            gate_tile = tl.load(gate_ptrs, mask=inside & (k[:, None] < left), other=0.0)
            up_tile = tl.load(up_ptrs, mask=inside & (k[:, None] < left), other=0.0)
        gate = dot(x_tile, gate_tile, gate, PRECISION)
        up_ = dot(x_tile, up_tile, up_, PRECISION)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    return gate, up_


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
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile; one of at most half the rows is computed at half the height."""
    num_m = tl.load(offsets + num_experts + 1)
    num_n = tl.cdiv(ffn_dim, BLOCK_N)
    size_h = 2 * ffn_dim if ACTIVATION == "swiglu" else ffn_dim
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = swizzled(tile, num_m, num_n, GROUP_M)
        expert = tl.load(table + m).to(tl.int64)
        row = tl.load(table + bound + m)
        end = tl.load(table + 2 * bound + m)
        small = (end - row <= BLOCK_M // 2).to(tl.int32)
        for HALVED in tl.static_range(2):
            if small == HALVED:
                _up_tile(
                    x,
                    w + expert * size_h * dim,
                    weights,
                    z,
                    a,
                    index,
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
