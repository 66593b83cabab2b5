"""Grouped GEMM with both sides loaded by TMA, for sm_90: the compiler specialises its warps.

Some warps load while the others multiply. Triton 3.6 arranges that where both sides come by TMA,
through descriptors made in the kernel, and a program asks for 4 warps. Rows cannot be gathered so:
this is for the down product and for dX. Shapes as in `grouped_gemm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import dot, num_programs, precision_of, rounded, swizzled
from dmoe_kernels.configs import Config, scaled_k
from dmoe_kernels.tiles import Tiles


def gemm_by_tma(
    a_RK: Tensor, w: Tensor, y_RN: Tensor, tiles: Tiles, *, transposed: bool, config: Config
) -> None:
    """Write each expert's rows times its matrix to `y_RN`; arguments as for `grouped_gemm`.

    Raises:
        RuntimeError: rows are not a multiple of 16 bytes long, or K is none of the block.
    """
    (num_rows, size_k), size_n = a_RK.shape, y_RN.shape[1]
    block_k = scaled_k(config, a_RK.itemsize)
    if size_k % block_k or any(t.shape[-1] * t.itemsize % 16 for t in (a_RK, w)):
        raise RuntimeError(f"K = {size_k} and N = {size_n} do not suit TMA and a block {block_k}")
    if not num_rows:
        return
    most = tiles.table_3M.shape[1] * triton.cdiv(size_n, config.block_n)
    triton.set_allocator(_workspace)
    gemm_tma_kernel[(num_programs(a_RK.device, most),)](
        a_RK,
        w,
        y_RN,
        tiles.table_3M,
        tiles.offsets,
        len(w),
        tiles.table_3M.shape[1],
        num_rows,
        size_n,
        size_k,
        TRANSPOSED=transposed,
        PRECISION=precision_of(a_RK.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Return memory for the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def gemm_tma_kernel(
    a,
    w,
    y,
    table,
    offsets,
    num_experts,
    bound,
    num_rows,
    size_n,
    size_k,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Take tile after tile; what TMA reads beyond an expert's rows or columns is not stored."""
    a_rows = tl.make_tensor_descriptor(a, [num_rows, size_k], [size_k, 1], [BLOCK_M, BLOCK_K])
    if TRANSPOSED:
        w_rows = tl.make_tensor_descriptor(
            w, [num_experts * size_n, size_k], [size_k, 1], [BLOCK_N, BLOCK_K]
        )
    else:
        w_rows = tl.make_tensor_descriptor(
            w, [num_experts * size_k, size_n], [size_n, 1], [BLOCK_K, BLOCK_N]
        )
    num_m = tl.load(offsets + num_experts + 1)
    num_n = tl.cdiv(size_n, BLOCK_N)
    total = num_m * num_n
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), warp_specialize=True):
        m, n = swizzled(tile, num_m, num_n, GROUP_M)
        expert = tl.load(table + m)
        row = tl.load(table + bound + m)
        end = tl.load(table + 2 * bound + m)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, size_k, BLOCK_K):
            a_tile = a_rows.load([row, k])
            if TRANSPOSED:
                w_tile = w_rows.load([expert * size_n + n * BLOCK_N, k]).T
            else:
                w_tile = w_rows.load([expert * size_k + k, n * BLOCK_N])
            acc = dot(a_tile, w_tile, acc, PRECISION)
        rows = row + tl.arange(0, BLOCK_M)
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        y_ptrs = y + rows.to(tl.int64)[:, None] * size_n + cols[None, :]
        mask = (rows < end)[:, None] & (cols < size_n)[None, :]
        tl.store(y_ptrs, rounded(acc, y.dtype.element_ty), mask=mask)
