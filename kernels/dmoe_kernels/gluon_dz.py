"""dZ for sm_90 in Gluon: the backward of the activation runs beside the next tile's products.

As in `gluon_up` one warpgroup loads and two multiply, 64 rows each and 256 columns. These leave
dY W_down in shared memory, in the rows' dtype; a fourth warpgroup reads Z, makes dZ, A and the
gate's gradient of it and stores them, while the others multiply the next tile. It moves as many
bytes as take two thirds of the time of the products.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F.
"""

import torch
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import num_programs
from dmoe_kernels.configs import Config
from dmoe_kernels.gluon_common import gl, gluon, jit, stage_before
from dmoe_kernels.gluon_up import BLOCK_M, check_widths, find_tile, load_tiles, product, skip_tile
from dmoe_kernels.tiles import Tiles, tile_rows

if gluon:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

STAGES = 3
LOAD_REGISTERS, FINISH_REGISTERS, MULTIPLY_REGISTERS = 56, 136, 160  # of 4 x 128


def dz(
    dy_ND: Tensor,
    index_R: Tensor,
    z_RH: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_down_EDF: Tensor,
    config: Config,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz_RH, a_RF = s act(z), and the gates' gradients, as `dz.dz` does for "swiglu".

    dY W_down is rounded to the rows' dtype before the activation's backward.

    Raises:
        RuntimeError: the kernel is not for this device, dtype or shape.
    """
    check_widths(dy_ND, w_down_EDF, transposed=False)
    (num_experts, dim, ffn_dim), num_rows = w_down_EDF.shape, len(index_R)
    dz_RH, a_RF = torch.empty_like(z_RH), z_RH.new_empty(num_rows, ffn_dim)
    # Each tile of columns has a part of a gate's gradient. Rows in no tile keep zero.
    parts = weights_R.new_zeros(ffn_dim // 256, num_rows)
    if not num_rows:
        return dz_RH, a_RF, parts.sum(0)
    if tiles is None or tiles.block_m != BLOCK_M:
        tiles = tile_rows(counts_E, num_rows, BLOCK_M)
    bound = tiles.table_3M.shape[1]
    dtype = gl.bfloat16 if dy_ND.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([64, 256], dtype)
    dz_kernel[(num_programs(dy_ND.device, bound * (ffn_dim // 256)),)](
        dy_ND,
        TensorDescriptor.from_tensor(w_down_EDF.view(-1, ffn_dim), [64, 256], layout),
        index_R,
        weights_R,
        z_RH,
        dz_RH,
        a_RF,
        parts,
        tiles.table_3M,
        tiles.offsets,
        num_experts,
        bound,
        num_rows,
        ffn_dim,
        dim,
        STAGES=STAGES,
        GROUP_M=config.group_m,
        LOAD_REGISTERS=LOAD_REGISTERS,
        FINISH_REGISTERS=FINISH_REGISTERS,
        MULTIPLY_REGISTERS=MULTIPLY_REGISTERS,
        num_warps=4,
    )
    return dz_RH, a_RF, parts.sum(0)


@jit
def _multiply(
    sizes,
    rings,
    barriers,
    left,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Multiply 64 rows of each tile and leave the sums in shared memory."""
    _, num_m, _, ffn_dim, dim = sizes
    products, ready, taken = left
    freed = barriers[1]
    # Of 512 threads none may have the registers of one instruction of 256 columns.
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    programs = gl.num_programs(0)
    _, row, end, _ = find_tile(gl.program_id(0), sizes, GROUP_M)
    for tile in range(gl.program_id(0), num_m * (ffn_dim // 256), programs):
        _, row_next, end_next, _ = find_tile(tile + programs, sizes, GROUP_M)
        if row + 64 * GROUP < end:
            acc, stage, phase = product(
                rings, barriers, dim, stage, phase, wide, True, False, GROUP, STAGES
            )
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(freed.index(stage_before(stage, STAGES)))
            mbarrier.wait(taken.index(GROUP), turn ^ 1)
            _leave(acc, products, 8 * GROUP, 256)
            mbarrier.arrive(ready.index(GROUP))
            turn = turn ^ 1
        else:
            stage, phase = skip_tile(barriers, dim, stage, phase, STAGES)
        row, end = row_next, end_next


@jit
def _leave(acc, products, first: tl.constexpr, WIDTH: tl.constexpr):
    """Store the pieces of 32 columns, from the first on."""
    if WIDTH == 32:
        products.index(first).store(acc.to(products.dtype))
    else:
        left, right = acc.reshape((64, 2, WIDTH // 2)).permute((0, 2, 1)).split()
        _leave(left, products, first, WIDTH // 2)
        _leave(right, products, first + WIDTH // 64, WIDTH // 2)


@jit
def _read(z, piece, row, end, n, ffn_dim, local, offsets_m):
    """Return the gate and up columns of a piece, zeros in rows from `end` on."""
    top = row + 64 * (piece // 8)
    begin = top.to(gl.int64) * (2 * ffn_dim) + n * 256 + piece % 8 * 32
    inside = ((offsets_m < end - top) & (piece < 16))[:, None]
    gate = gl.load(z + begin + local, mask=inside, other=0.0)
    return gate, gl.load(z + begin + ffn_dim + local, mask=inside, other=0.0)


@jit
def _finish(tensors, sizes, left, num_rows, GROUP_M: tl.constexpr):
    """Make dZ, A and the gates' gradients of the products of each tile."""
    weights, z, dz_, a, parts, last = tensors
    _, num_m, _, ffn_dim, _ = sizes
    products, ready, taken = left
    dtype: gl.constexpr = z.dtype.element_ty
    # 4 threads have the 32 columns of a row, 16 bytes each.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    offsets_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    offsets_n = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    _zero_rows(dz_, last, num_rows, 2 * ffn_dim, layout)
    _zero_rows(a, last, num_rows, ffn_dim, layout)
    # Places in a piece of 64 x 32; where it begins is one number, as registers are scarce.
    local = offsets_m[:, None] * (2 * ffn_dim) + offsets_n[None, :]
    local_a = offsets_m[:, None] * ffn_dim + offsets_n[None, :]
    turn_0 = gl.to_tensor(0)
    turn_1 = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_m * (ffn_dim // 256), gl.num_programs(0)):
        _, row, end, n = find_tile(tile, sizes, GROUP_M)
        both = row + 64 < end
        part = gl.zeros((64,), gl.float32, layout=gl.SliceLayout(1, layout))
        gate_next, up_next = _read(z, 0, row, end, n, ffn_dim, local, offsets_m)
        for piece in range(0, gl.where(both, 16, 8)):
            group, eighth = piece // 8, piece % 8
            top = row + 64 * group
            inside = offsets_m < end - top
            begin_a = top.to(gl.int64) * ffn_dim + n * 256 + eighth * 32
            begin = begin_a + top.to(gl.int64) * ffn_dim
            gate, up = gate_next.to(gl.float32), up_next.to(gl.float32)
            # The next piece is on its way while this one is worked on; after the last come zeros.
            gate_next, up_next = _read(z, piece + 1, row, end, n, ffn_dim, local, offsets_m)
            weight = gl.load(weights + top + offsets_m, mask=inside, other=0.0).to(gl.float32)
            turn = gl.where(group == 1, turn_1, turn_0)
            mbarrier.wait(ready.index(group), turn, pred=eighth == 0)
            da = products.index(piece).load(layout).to(gl.float32)
            mbarrier.arrive(taken.index(group), pred=eighth == 7)
            sigmoid = 1 / (1 + gl.exp(-gate))
            silu = gate * sigmoid
            hidden = silu * up
            part = gl.where(eighth == 0, 0.0, part) + gl.sum(da * hidden, 1)
            scaled = (hidden * weight[:, None]).to(dtype)
            gl.store(a + begin_a + local_a, scaled, mask=inside[:, None])
            da = da * weight[:, None]
            gl.store(dz_ + begin + ffn_dim + local, (da * silu).to(dtype), mask=inside[:, None])
            dgate = da * up * (sigmoid + silu * (1 - sigmoid))
            gl.store(dz_ + begin + local, dgate.to(dtype), mask=inside[:, None])
            place = parts + n.to(gl.int64) * num_rows + top + offsets_m
            gl.store(place, part, mask=inside & (eighth == 7))
        turn_0 = turn_0 ^ 1
        turn_1 = gl.where(both, turn_1 ^ 1, turn_1)


@jit
def _zero_rows(x, last, num_rows, width, layout: tl.constexpr):
    """Write zeros to the rows after those of all experts: see `dz.dz`."""
    rows = last + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    offsets_n = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    zeros = gl.zeros((64, 32), x.dtype.element_ty, layout=layout)
    for col in range(32 * gl.program_id(0), width, 32 * gl.num_programs(0)):
        places = rows.to(gl.int64)[:, None] * width + (col + offsets_n)[None, :]
        gl.store(x + places, zeros, mask=(rows < num_rows)[:, None])


@jit(do_not_specialize=["num_experts", "bound"])
def dz_kernel(
    dy,
    w_rows,
    index,
    weights,
    z,
    dz_,
    a,
    parts,
    table,
    offsets,
    num_experts,
    bound,
    num_rows,
    ffn_dim,
    dim,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOAD_REGISTERS: tl.constexpr,
    FINISH_REGISTERS: tl.constexpr,
    MULTIPLY_REGISTERS: tl.constexpr,
):
    """Take tile after tile of dY W_down, with the backward of SwiGLU a tile behind."""
    dtype: gl.constexpr = z.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], rows)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], rows)
    products = gl.allocate_shared_memory(dtype, [16, 64, 32], gl.NVMMASharedLayout(64, 16))
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # Filled by what TMA brings, and by each thread that copies; freed by each warpgroup.
        mbarrier.init(filled.index(stage), count=1 + 128)
        mbarrier.init(freed.index(stage), count=2)
    for group in gl.static_range(2):
        mbarrier.init(ready.index(group), count=1)
        mbarrier.init(taken.index(group), count=1)
    num_m = gl.load(offsets + num_experts + 1)
    sizes = (table, num_m, bound, ffn_dim, dim)
    rings = (a_ring, w_ring)
    barriers = (filled, freed)
    left = (products, ready, taken)
    sources = (dy, None, w_rows, index)
    last = gl.load(offsets + num_experts)
    tensors = (weights, z, dz_, a, parts, last)
    gl.warp_specialize(
        [
            (_multiply, (sizes, rings, barriers, left, 0, STAGES, GROUP_M)),
            (_multiply, (sizes, rings, barriers, left, 1, STAGES, GROUP_M)),
            (_finish, (tensors, sizes, left, num_rows, GROUP_M)),
            (load_tiles, (sources, sizes, rings, barriers, True, False, False, STAGES, GROUP_M, 4)),
        ],
        [4, 4, 4],
        [MULTIPLY_REGISTERS, FINISH_REGISTERS, LOAD_REGISTERS],
    )
