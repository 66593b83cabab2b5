"""The experts' weight gradient for sm_90 in Gluon: warps that load, and warps that multiply.

One program a multiprocessor takes tile after tile of 128 or 192 by 256 numbers of a^T b. One
warpgroup loads rows of both sides into a ring of stages: those of the side in order by TMA, those
of the other through the index, by asynchronous copies (TMA cannot gather on sm_90). Two or three
warpgroups multiply, each 64 columns of the left side with 256 of the right one; tensor cores read
both transposed. Left is a, or b: then the product is the transpose, and is turned as it is stored.

Each warpgroup frees a stage on its own, and starts later than the one before. So while one of them
stores its results, the others multiply, and the stages of the next tile are loaded.

Shapes: R routed rows, E experts, (M, N) a gradient.
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


LOAD_WARPS = 4


def outer(
    a_RM: Tensor,
    b_RN: Tensor,
    index_R: Tensor,
    offsets: Tensor,
    *,
    gather_a: bool,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """Return (E, M, N), a^T b over the rows of each expert, as `grouped_gemm.grouped_outer` does.

    A config of 128 numbers has them of a, and the 256 of b. One of 192 has them of the side in
    order: more columns of the side that is gathered take fewer copies, and where that is a, the
    transpose is computed.

    Raises:
        RuntimeError: the kernel is not for this device, dtype or shape.
    """
    check_suited(a_RM, b_RN)
    if dtype not in (a_RM.dtype, torch.float32):
        raise RuntimeError(f"this kernel writes {a_RM.dtype} or float32, not {dtype}")
    left_is_a = left_side_is_a(config, gather_a)
    left, right = (a_RM, b_RN) if left_is_a else (b_RN, a_RM)
    size_l, size_r = left.shape[1], right.shape[1]
    if size_l % config.block_m or size_r % 256:
        raise RuntimeError(f"{size_l} is no multiple of {config.block_m}, or {size_r} none of 256")
    shape = (len(offsets) - 2, a_RM.shape[1], b_RN.shape[1])
    if not len(index_R):
        return a_RM.new_zeros(shape, dtype=dtype)
    out = a_RM.new_empty(shape, dtype=dtype)
    _launch(left, right, index_R, offsets, out, left_is_a, left_is_a == gather_a, config)
    return out


def left_side_is_a(config: Config, gather_a: bool) -> bool:
    """Say whether a is the side of which a tile has 128 or 192 numbers, b that of 256."""
    return config.block_m == 128 or not gather_a


def load_registers(config: Config) -> int:
    """Return the registers of a thread that loads; those that multiply share the rest."""
    return 56 if config.block_m == 128 else 32


def suits_gluon_outer(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Say whether the kernel can multiply these in its first form."""
    try:
        check_suited(a, b)
    except RuntimeError:
        return False
    sizes = a.shape[1] % 128 == 0 and b.shape[1] % 256 == 0
    return sizes and dtype in (a.dtype, torch.float32)


def _launch(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    offsets: Tensor,
    out: Tensor,
    left_is_a: bool,
    gather_left: bool,
    config: Config,
) -> None:
    num_experts, _, size_n = out.shape
    dtype = gl.bfloat16 if left.dtype == torch.bfloat16 else gl.float16

    def described(of: Tensor, block: list[int], element: Any) -> Any:
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        return TensorDescriptor.from_tensor(of, block, layout)

    stored = [64, 256 // out.itemsize]
    groups = config.block_m // 64
    tiles = num_experts * (left.shape[1] // config.block_m) * (right.shape[1] // 256)
    outer_kernel[(num_programs(left.device, tiles),)](
        left if gather_left else right,
        described(right, [64, 256], dtype) if gather_left else described(left, [64, 64], dtype),
        described(
            out.view(-1, size_n),
            stored if left_is_a else stored[::-1],
            gl.float32 if out.dtype == torch.float32 else dtype,
        ),
        index,
        offsets,
        num_experts,
        left.shape[1],
        right.shape[1],
        GATHER_LEFT=gather_left,
        LEFT_IS_A=left_is_a,
        GROUPS=groups,
        STAGES=config.stages,
        GROUP_SIZE=config.group_m,
        LOAD_WARPS=LOAD_WARPS,
        LOAD_REGISTERS=load_registers(config),
        MULTIPLY_REGISTERS=register_split(groups, LOAD_WARPS, load_registers(config)),
        num_warps=4,
    )


@jit
def _num_tiles(sizes, GROUPS: tl.constexpr):
    """Return how many tiles an expert has."""
    _, _, size_l, size_r = sizes
    return size_l // (64 * GROUPS) * (size_r // 256)


@jit
def _find(tile, sizes, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Return expert, first row, end, and first column of both sides; no rows past the last tile."""
    offsets, num_experts, size_l, size_r = sizes
    num_l = size_l // (64 * GROUPS)
    num_r = size_r // 256
    expert = tile // (num_l * num_r)
    local = tile % (num_l * num_r)
    width = GROUP_SIZE * num_r
    first = local // width * GROUP_SIZE
    size = gl.minimum(num_l - first, GROUP_SIZE)
    local = local % width
    inside = expert < num_experts
    begin = gl.load(offsets + expert, mask=inside, other=0)
    end = gl.load(offsets + expert + 1, mask=inside, other=0)
    return expert, begin, end, (first + local % size) * (64 * GROUPS), local // size * 256


@jit
def _load(
    sources,
    sizes,
    rings,
    barriers,
    GATHER_LEFT: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LOAD_WARPS: tl.constexpr,
):
    """Fill the ring with the stages of one tile after the other."""
    gathered, in_order, index = sources
    _, num_experts, size_l, size_r = sizes
    left_ring, right_ring = rings
    filled, freed = barriers
    size = size_l if GATHER_LEFT else size_r
    # 8 threads copy 128 bytes of a row, 16 bytes each.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [LOAD_WARPS, 1], [1, 0])
    columns: gl.constexpr = 64 if GATHER_LEFT else 256
    offsets_k = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    offsets_c = gl.arange(0, columns, layout=gl.SliceLayout(0, layout))
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    programs = gl.num_programs(0)
    _, begin, end, left, right = _find(gl.program_id(0), sizes, GROUPS, GROUP_SIZE)
    for tile in range(gl.program_id(0), num_experts * _num_tiles(sizes, GROUPS), programs):
        # Where the next tile lies is on its way while this one is loaded, as is the next stage's
        # part of the index.
        _, begin_next, end_next, left_next, right_next = _find(
            tile + programs, sizes, GROUPS, GROUP_SIZE
        )
        rows = begin + offsets_k
        source = gl.load(index + rows, mask=rows < end, other=0).to(gl.int32)
        for row in range(begin, end, 64):
            rows = row + offsets_k
            # What is multiplied with rows of another expert must be zero.
            inside = (rows < end)[:, None]
            after = rows + 64
            source_next = gl.load(index + after, mask=after < end, other=0).to(gl.int32)
            mbarrier.wait(freed.index(stage), phase ^ 1)
            full = filled.index(stage)
            mbarrier.expect(full, 32768 if GATHER_LEFT else 8192 * GROUPS)
            starts = gathered + source.to(gl.int64)[:, None] * size
            if GATHER_LEFT:
                tma.async_copy_global_to_shared(
                    in_order, [row, right], full, right_ring.index(stage)
                )
                for group in gl.static_range(GROUPS):
                    async_copy.async_copy_global_to_shared(
                        left_ring.index(GROUPS * stage + group),
                        starts + (left + 64 * group + offsets_c)[None, :],
                        mask=inside,
                    )
            else:
                for group in gl.static_range(GROUPS):
                    tma.async_copy_global_to_shared(
                        in_order,
                        [row, left + 64 * group],
                        full,
                        left_ring.index(GROUPS * stage + group),
                    )
                async_copy.async_copy_global_to_shared(
                    right_ring.index(stage), starts + (right + offsets_c)[None, :], mask=inside
                )
            # Each thread arrives once its copies have come: the barrier counts them all.
            async_copy.mbarrier_arrive(full, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
            source = source_next
        begin, end, left, right = begin_next, end_next, left_next, right_next


@jit
def _halves(acc, WIDTH: tl.constexpr):
    """Return the left and the right half of the columns, WIDTH each, in the same registers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    left, right = acc.reshape((64, 2, WIDTH)).permute((0, 2, 1)).split()
    return (
        gl.convert_layout(left, layout, assert_trivial=True),
        gl.convert_layout(right, layout, assert_trivial=True),
    )


@jit
def _put(acc, staging, out_rows, row, col, LEFT_IS_A: tl.constexpr):
    """Store (64, 256) numbers, those of `row` and `col` on, through shared memory."""
    dtype: gl.constexpr = out_rows.dtype
    WIDTH: gl.constexpr = 2048 // dtype.primitive_bitwidth
    pieces = _halves(acc, 128)
    if WIDTH == 64:
        pieces = _halves(pieces[0], 64) + _halves(pieces[1], 64)
    for piece in gl.static_range(256 // WIDTH):
        number = pieces[piece].to(dtype)
        tma.store_wait(0)
        if LEFT_IS_A:
            staging.store(number)
            fence_async_shared()
            tma.async_copy_shared_to_global(out_rows, [row, col + piece * WIDTH], staging)
        else:
            staging.store(number.permute((1, 0)))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_rows, [row + piece * WIDTH, col], staging)


@jit
def _multiply(
    stored,
    sizes,
    rings,
    barriers,
    LEFT_IS_A: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Multiply 64 columns of the left side of each tile, and store them."""
    out_rows, staging = stored
    _, num_experts, size_l, size_r = sizes
    left_ring, right_ring = rings
    filled, freed = barriers
    total = num_experts * _num_tiles(sizes, GROUPS)
    # Three warpgroups have 160 registers a thread, too few for one instruction of 256 columns.
    columns: gl.constexpr = 256 if GROUPS == 2 else 128
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    programs = gl.num_programs(0)
    expert, begin, end, left, right = _find(gl.program_id(0), sizes, GROUPS, GROUP_SIZE)
    if GROUP > 0:
        # The lead that the warpgroup before has now, it keeps: while one of them stores, the
        # others multiply. A first tile of fewer stages gives none.
        behind: gl.constexpr = 2 if GROUPS == 2 else GROUP
        mbarrier.wait(filled.index(behind), 0, pred=end - begin > 64 * behind)
    for tile in range(gl.program_id(0), total, programs):
        acc = gl.zeros((64, 256), gl.float32, layout=wide)
        for row in range(begin, end, 64):
            mbarrier.wait(filled.index(stage), phase)
            # Rows were written by ordinary copies, and tensor cores read shared memory through the
            # asynchronous proxy. The barrier orders the copies before this thread, the fence
            # orders them before what it has the tensor cores read.
            fence_async_shared()
            acc = warpgroup_mma(
                left_ring.index(GROUPS * stage + GROUP).permute((1, 0)),
                right_ring.index(stage),
                acc,
                is_async=True,
            )
            # All but this product are done, so that the stage before is free.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(freed.index(stage_before(stage, STAGES)), pred=row > begin)
            stage, phase = next_stage(stage, phase, STAGES)
        # These come while the last product runs.
        expert_next, begin_next, end_next, left_next, right_next = _find(
            tile + programs, sizes, GROUPS, GROUP_SIZE
        )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(freed.index(stage_before(stage, STAGES)), pred=end > begin)
        top = left + 64 * GROUP
        # An expert without rows had no stages, and its sums are zero.
        if LEFT_IS_A:
            row, col = expert * size_l + top, right
        else:
            row, col = expert * size_r + right, top
        _put(acc, staging.index(GROUP), out_rows, row, col, LEFT_IS_A)
        expert, begin, end, left, right = (
            expert_next,
            begin_next,
            end_next,
            left_next,
            right_next,
        )
    tma.store_wait(0)


@jit(do_not_specialize=["num_experts"])
def outer_kernel(
    gathered,
    in_order,
    out_rows,
    index,
    offsets,
    num_experts,
    size_l,
    size_r,
    GATHER_LEFT: tl.constexpr,
    LEFT_IS_A: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LOAD_WARPS: tl.constexpr,
    LOAD_REGISTERS: tl.constexpr,
    MULTIPLY_REGISTERS: tl.constexpr,
):
    """Write left^T right of each expert's rows, or its transpose if left is not a."""
    dtype: gl.constexpr = gathered.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    out_dtype: gl.constexpr = out_rows.dtype
    left_ring = gl.allocate_shared_memory(dtype, [GROUPS * STAGES, 64, 64], rows)
    right_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], rows)
    width: gl.constexpr = 2048 // out_dtype.primitive_bitwidth
    shape: gl.constexpr = [64, width] if LEFT_IS_A else [width, 64]
    staging = gl.allocate_shared_memory(out_dtype, [GROUPS, shape[0], shape[1]], out_rows.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # Filled by what TMA brings, and by each thread that copies; freed by each warpgroup.
        mbarrier.init(filled.index(stage), count=1 + 32 * LOAD_WARPS)
        mbarrier.init(freed.index(stage), count=GROUPS)
    sizes = (offsets, num_experts, size_l, size_r)
    rings = (left_ring, right_ring)
    barriers = (filled, freed)
    stored = (out_rows, staging)
    sources = (gathered, in_order, index)
    # fmt: off
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (stored, sizes, rings, barriers,
                             LEFT_IS_A, 2, 0, STAGES, GROUP_SIZE)),
                (_multiply, (stored, sizes, rings, barriers,
                             LEFT_IS_A, 2, 1, STAGES, GROUP_SIZE)),
                (_load, (sources, sizes, rings, barriers,
                         GATHER_LEFT, 2, STAGES, GROUP_SIZE, LOAD_WARPS)),
            ],
            [4, LOAD_WARPS],
            [MULTIPLY_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (stored, sizes, rings, barriers,
                             LEFT_IS_A, 3, 0, STAGES, GROUP_SIZE)),
                (_multiply, (stored, sizes, rings, barriers,
                             LEFT_IS_A, 3, 1, STAGES, GROUP_SIZE)),
                (_multiply, (stored, sizes, rings, barriers,
                             LEFT_IS_A, 3, 2, STAGES, GROUP_SIZE)),
                (_load, (sources, sizes, rings, barriers,
                         GATHER_LEFT, 3, STAGES, GROUP_SIZE, LOAD_WARPS)),
            ],
            [4, 4, LOAD_WARPS],
            [MULTIPLY_REGISTERS, MULTIPLY_REGISTERS, LOAD_REGISTERS],
        )
    # fmt: on
