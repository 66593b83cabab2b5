"""The tile table: which rows of which expert each tile of a grouped GEMM covers, made on the GPU.

Its length is bounded on the host, by ceil(R / block) + E, and its true length stays on the GPU,
where the kernels read it: no launch waits for the counts, and all may be captured in a CUDA graph.
Shapes: R routed rows, E experts, M the bound on tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """Rows sorted by expert, cut into tiles that do not cross experts."""

    table_3M: Tensor
    """(3, M) int32: expert, first row and end of the expert's rows, of each tile."""
    offsets: Tensor
    """(E + 2,) int32: where each expert's rows begin, their end, and the number of tiles."""
    block_m: int
    """Rows of a tile."""


def tile_rows(counts_E: Tensor, num_rows: int, block_m: int) -> Tiles:
    """Cut the rows of each expert into tiles of `block_m`.

    Args:
        counts_E: (E,) int64 rows of each expert.
        num_rows: R, at least the sum of the counts; rows past the sum are in no tile.
        block_m: rows of a tile.
    """
    num_experts = len(counts_E)
    bound = triton.cdiv(num_rows, block_m) + num_experts
    table_3M = torch.empty(3, bound, dtype=torch.int32, device=counts_E.device)
    offsets = torch.empty(num_experts + 2, dtype=torch.int32, device=counts_E.device)
    block_e = triton.next_power_of_2(num_experts)
    tile_table_kernel[(num_experts,)](
        counts_E, table_3M, offsets, num_experts, bound, BLOCK_M=block_m, BLOCK_E=block_e
    )
    return Tiles(table_3M, offsets, block_m)


@triton.jit
def tile_table_kernel(
    counts, table, offsets, num_experts, bound, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Write the tiles of one expert, after those of the experts before it."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    count_e = tl.load(counts + e, mask=e < num_experts, other=0).to(tl.int32)
    tiles_e = (count_e + BLOCK_M - 1) // BLOCK_M
    begin = tl.sum(tl.where(e < expert, count_e, 0))
    end = begin + tl.sum(tl.where(e == expert, count_e, 0))
    first = tl.sum(tl.where(e < expert, tiles_e, 0))
    tl.store(offsets + expert, begin)
    if expert == num_experts - 1:
        tl.store(offsets + num_experts, end)
        tl.store(offsets + num_experts + 1, tl.sum(tiles_e))
    CHUNK: tl.constexpr = 128
    num_tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    for chunk in range(0, num_tiles, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        inside = tile < num_tiles
        tl.store(table + first + tile, expert, mask=inside)
        tl.store(table + bound + first + tile, begin + tile * BLOCK_M, mask=inside)
        tl.store(table + 2 * bound + first + tile, end, mask=inside)
