"""The experts' forward products for sm_90 in Gluon: warps that load, and warps that multiply.

One program a multiprocessor takes tile after tile of 128 rows. One warpgroup loads: rows of
x through the index, by asynchronous copies (TMA cannot gather on sm_90), the weights by TMA, into a
ring of stages. Two warpgroups multiply, 64 rows each and 256 columns: for `up` 128 gate
columns and the 128 up columns that belong to them, so that one accumulator holds both halves of
SwiGLU.

Each warpgroup frees a stage on its own. While results are stored, by TMA too, the stages of the
next tile are loaded.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else the
columns of the product.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import num_programs
from dmoe_kernels.configs import Config
from dmoe_kernels.gluon_common import (
    HAS_GLUON,
    check_suited,
    gl,
    jit,
    next_stage,
    register_split,
    stage_before,
)
from dmoe_kernels.tiles import Tiles, tile_rows

if HAS_GLUON:
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


BLOCK_M = 128
STAGES = 4
"""Of the ring; one takes 48 KiB."""
LOAD_REGISTERS = 56
"""Of a thread that loads; those that multiply share the rest."""


def up(
    x_ND: Tensor,
    index_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EHD: Tensor,
    config: Config,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return z_RH = W_up x of each routed row, and a_RF = s act(z), as `up.up` does for "swiglu".

    Raises:
        RuntimeError: the kernel is not for this device, dtype or shape.
    """
    check_widths(x_ND, w_up_EHD)
    num_rows, size_h = len(index_R), w_up_EHD.shape[1]
    z_RH, a_RF = x_ND.new_empty(num_rows, size_h), x_ND.new_empty(num_rows, size_h // 2)
    if tiles is None or tiles.block_m != BLOCK_M:
        tiles = tile_rows(counts_E, num_rows, BLOCK_M)
    _launch(x_ND, index_R, weights_R, w_up_EHD, z_RH, a_RF, tiles, config, transposed=True)
    return z_RH, a_RF


def gemm(
    a_RK: Tensor, w: Tensor, y_RN: Tensor, tiles: Tiles, *, transposed: bool, config: Config
) -> None:
    """Write each expert's rows times its matrix to `y_RN`, as `grouped_gemm` does.

    Raises:
        RuntimeError: the kernel is not for this device, dtype or shape.
    """
    check_widths(a_RK, w, transposed=transposed)
    assert tiles.block_m == BLOCK_M
    _launch(a_RK, None, None, w, y_RN, None, tiles, config, transposed=transposed)


def check_widths(x: Tensor, w: Tensor, *, transposed: bool = True) -> None:
    """Raise RuntimeError where the kernels cannot multiply these."""
    check_suited(x, w)
    size_h, dim = w.shape[1:] if transposed else w.shape[:0:-1]
    if dim % 64 or size_h % 256:
        raise RuntimeError(f"{dim} is no multiple of 64, or {size_h} none of 256")


def suits_gluon(x: Tensor, w: Tensor, *, transposed: bool = True) -> bool:
    """Say whether the kernels can multiply these."""
    try:
        check_widths(x, w, transposed=transposed)
    except RuntimeError:
        return False
    return True


def _launch(
    x: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    w: Tensor,
    z: Tensor,
    a: Tensor | None,
    tiles: Tiles,
    config: Config,
    *,
    transposed: bool,
) -> None:
    if not len(z):
        return
    size_h, dim = z.shape[1], x.shape[1]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16

    def rows(of: Tensor | None, block: list[int]) -> Any:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return None if of is None else TensorDescriptor.from_tensor(of, block, layout)

    load_warps = 4 if index is not None else 1
    forward_kernel[(num_programs(x.device, tiles.table_3M.shape[1] * (size_h // 256)),)](
        x if index is not None else None,
        rows(x if index is None else None, [64, 64]),
        rows(w.view(-1, w.shape[2]), [128, 64] if transposed else [64, 256]),
        index,
        weights,
        z,
        a,
        rows(z, [64, 128]),
        rows(a, [64, 128]),
        tiles.table_3M,
        tiles.offsets,
        len(w),
        tiles.table_3M.shape[1],
        size_h,
        dim,
        TRANSPOSED=transposed,
        STAGES=STAGES,
        GROUP_M=config.group_m,
        LOAD_WARPS=load_warps,
        LOAD_REGISTERS=LOAD_REGISTERS,
        MULTIPLY_REGISTERS=register_split(2, load_warps, LOAD_REGISTERS),
        num_warps=4,
    )


@jit
def find_tile(tile, sizes, GROUP_M: tl.constexpr):
    """Return expert, first row, end and n of a tile; zeros past the last one.

    GROUP_M rows of tiles share a block of weights in L2.
    """
    table, num_m, bound, size_h, _ = sizes
    num_n = size_h // 256
    width = GROUP_M * num_n
    first = tile // width * GROUP_M
    # At least 1: past the last tile no rows may be left, and dividing by 0 is undefined.
    size = gl.maximum(gl.minimum(num_m - first, GROUP_M), 1)
    local = tile % width
    place = table + first + local % size
    inside = tile < num_m * num_n
    expert = gl.load(place, mask=inside, other=0)
    row = gl.load(place + bound, mask=inside, other=0)
    end = gl.load(place + 2 * bound, mask=inside, other=0)
    return expert, row, end, local // size


@jit
def load_tiles(
    sources,
    sizes,
    rings,
    barriers,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOAD_WARPS: tl.constexpr,
):
    """Fill the ring with the stages of one tile after the other."""
    x, x_rows, w_rows, index = sources
    _, num_m, _, size_h, dim = sizes
    a_ring, w_ring = rings
    filled, freed = barriers
    gap = size_h // 2 if GATED else 128
    # 8 threads copy a row's 128 bytes, 16 bytes each.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [LOAD_WARPS, 1], [1, 0])
    offsets_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    offsets_k = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    programs = gl.num_programs(0)
    expert, row, end, n = find_tile(gl.program_id(0), sizes, GROUP_M)
    for tile in range(gl.program_id(0), num_m * (size_h // 256), programs):
        col = n * (128 if GATED else 256)
        # Where the next tile lies is on its way while this one is loaded.
        expert_next, row_next, end_next, n_next = find_tile(tile + programs, sizes, GROUP_M)
        for k in range(0, dim, 64):
            gathered = ()
            if GATHER:
                # They are read again for each stage, from the L1 cache: registers are scarce.
                for group in gl.static_range(2):
                    rows = row + 64 * group + offsets_m
                    # Rows past the end repeat a good one; they are not stored.
                    rows = gl.where(rows < end, rows, row)
                    gathered += (gl.load(index + rows).to(gl.int32),)
            mbarrier.wait(freed.index(stage), phase ^ 1)
            full = filled.index(stage)
            mbarrier.expect(full, 32768 if GATHER else 32768 + 16384)
            if TRANSPOSED:
                first = expert * size_h + col
                tma.async_copy_global_to_shared(w_rows, [first, k], full, w_ring.index(2 * stage))
                tma.async_copy_global_to_shared(
                    w_rows, [first + gap, k], full, w_ring.index(2 * stage + 1)
                )
            else:
                first = expert * dim + k
                tma.async_copy_global_to_shared(w_rows, [first, col], full, w_ring.index(stage))
            for group in gl.static_range(2):
                buffer = a_ring.index(2 * stage + group)
                if GATHER:
                    source = gathered[group].to(gl.int64)
                    x_ptrs = x + source[:, None] * dim + (k + offsets_k)[None, :]
                    async_copy.async_copy_global_to_shared(buffer, x_ptrs)
                else:
                    tma.async_copy_global_to_shared(x_rows, [row + 64 * group, k], full, buffer)
            if GATHER:
                # Each thread arrives once its copies have come: the barrier counts them all.
                async_copy.mbarrier_arrive(full, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        expert, row, end, n = expert_next, row_next, end_next, n_next


@jit
def product(
    rings,
    barriers,
    dim,
    stage,
    phase,
    layout: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return (64, 256) sums, of which the last product still runs, and the stage after it."""
    a_ring, w_ring = rings
    filled, freed = barriers
    acc = gl.zeros((64, 256), gl.float32, layout=layout)
    for k in range(0, dim, 64):
        mbarrier.wait(filled.index(stage), phase)
        if GATHER:
            # Rows were written by ordinary copies, and tensor cores read shared memory through the
            # asynchronous proxy. The barrier orders the copies before this thread, the fence orders
            # them before what it has the tensor cores read.
            fence_async_shared()
        w = w_ring.index(stage)
        if TRANSPOSED:
            w = w.permute((1, 0))
        acc = warpgroup_mma(a_ring.index(2 * stage + GROUP), w, acc, is_async=True)
        # All but this product are done, so that the stage before is free.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(freed.index(stage_before(stage, STAGES)), pred=k > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


@jit
def skip_tile(barriers, dim, stage, phase, STAGES: tl.constexpr):
    """Free the stages of a tile as they come; return the stage after them."""
    filled, freed = barriers
    for _ in range(0, dim, 64):
        mbarrier.wait(filled.index(stage), phase)
        mbarrier.arrive(freed.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@jit
def _put(tile, staging, out, out_rows, row, end, col, width):
    """Store (64, 128) numbers through shared memory; rows from `end` on are not written."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tma.store_wait(0)
    staging.store(tile)
    if row + 64 <= end:
        fence_async_shared()
        tma.async_copy_shared_to_global(out_rows, [row, col], staging)
    else:
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        cols = col + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
        ptrs = out + rows.to(gl.int64)[:, None] * width + cols[None, :]
        gl.store(ptrs, staging.load(layout), mask=(rows < end)[:, None])


@jit
def _multiply(
    stored,
    sizes,
    rings,
    barriers,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Multiply 64 rows of each tile, and store them."""
    weights, z, a, z_rows, a_rows, staging = stored
    staging = staging.index(GROUP)
    _, num_m, _, size_h, dim = sizes
    freed = barriers[1]
    total = num_m * (size_h // 256)
    gap = size_h // 2 if GATED else 128
    dtype: gl.constexpr = z.dtype.element_ty
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    offsets_m = gl.arange(0, 64, layout=gl.SliceLayout(1, narrow))
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    programs = gl.num_programs(0)
    _, row, end, n = find_tile(gl.program_id(0), sizes, GROUP_M)
    for tile in range(gl.program_id(0), total, programs):
        top = row + 64 * GROUP
        if top < end:
            acc, stage, phase = product(
                rings, barriers, dim, stage, phase, wide, GATHER, TRANSPOSED, GROUP, STAGES
            )
            # These come while the last product runs; any earlier, the fences above would wait.
            rows = top + offsets_m
            if GATED:
                weight = gl.load(weights + rows, mask=rows < end, other=0.0).to(gl.float32)
            _, row_next, end_next, n_next = find_tile(tile + programs, sizes, GROUP_M)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(freed.index(stage_before(stage, STAGES)))
            left, right = acc.reshape((64, 2, 128)).permute((0, 2, 1)).split()
            left = gl.convert_layout(left, narrow, assert_trivial=True).to(dtype)
            right = gl.convert_layout(right, narrow, assert_trivial=True).to(dtype)
            col = n * (128 if GATED else 256)
            _put(left, staging, z, z_rows, top, end, col, size_h)
            if GATED:
                # Backward starts from the rounded numbers, so the activation does, too.
                gate = left.to(gl.float32)
                hidden = gate * (1 / (1 + gl.exp(-gate))) * right.to(gl.float32)
                hidden = (hidden * weight[:, None]).to(dtype)
                _put(hidden, staging, a, a_rows, top, end, col, size_h // 2)
            _put(right, staging, z, z_rows, top, end, col + gap, size_h)
        else:
            # A short tile has no rows here.
            _, row_next, end_next, n_next = find_tile(tile + programs, sizes, GROUP_M)
            stage, phase = skip_tile(barriers, dim, stage, phase, STAGES)
        row, end, n = row_next, end_next, n_next
    tma.store_wait(0)


@jit(do_not_specialize=["num_experts", "bound"])
def forward_kernel(
    x,
    x_rows,
    w_rows,
    index,
    weights,
    z,
    a,
    z_rows,
    a_rows,
    table,
    offsets,
    num_experts,
    bound,
    size_h,
    dim,
    TRANSPOSED: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOAD_WARPS: tl.constexpr,
    LOAD_REGISTERS: tl.constexpr,
    MULTIPLY_REGISTERS: tl.constexpr,
):
    """Write z and, if `a` is given, SwiGLU of it; rows of x are gathered if `x` is given."""
    GATED: gl.constexpr = a is not None
    GATHER: gl.constexpr = x is not None
    dtype: gl.constexpr = z.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], rows)
    shape: gl.constexpr = [2 * STAGES, 128, 64] if TRANSPOSED else [STAGES, 64, 256]
    w_ring = gl.allocate_shared_memory(dtype, shape, rows)
    staging = gl.allocate_shared_memory(dtype, [2, 64, 128], rows)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # Filled by what TMA brings, and by each thread that copies; freed by each warpgroup.
        mbarrier.init(filled.index(stage), count=1 + (32 * LOAD_WARPS if GATHER else 0))
        mbarrier.init(freed.index(stage), count=2)
    num_m = gl.load(offsets + num_experts + 1)
    w_stages = w_ring
    if TRANSPOSED:
        # The same bytes, as the tensor cores read them.
        w_stages = w_ring._reinterpret(dtype, [STAGES, 256, 64], rows)
    sizes = (table, num_m, bound, size_h, dim)
    barriers = (filled, freed)
    stored = (weights, z, a, z_rows, a_rows, staging)
    sources = (x, x_rows, w_rows, index)
    filling = (a_ring, w_ring)
    read = (a_ring, w_stages)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (stored, sizes, read, barriers,
                         GATHER, GATED, TRANSPOSED, 0, STAGES, GROUP_M)),
            (_multiply, (stored, sizes, read, barriers,
                         GATHER, GATED, TRANSPOSED, 1, STAGES, GROUP_M)),
            (load_tiles, (sources, sizes, filling, barriers,
                          GATHER, GATED, TRANSPOSED, STAGES, GROUP_M, LOAD_WARPS)),
        ],
        [4, LOAD_WARPS],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )
    # fmt: on
