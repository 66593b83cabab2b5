"""Positions of slots in their experts, by which capacity is given: a counting sort without a sort.

Count by block, scan, then count within the block, as `slots` does, for many groups of slots at
once. Shapes: G groups, S slots of a group, in the order in which they are served, E experts, P
blocks of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.slots import BLOCK, count_kernel, rank_in_block, scan_block, scan_kernel


def positions(ids_GS: Tensor, num_experts: int) -> Tensor:
    """Return (G, S) int32: how many slots of the group go before each and have the same expert.

    Args:
        ids_GS: int64 expert of each slot, -1 where unused; those have positions among themselves.
        num_experts: E.
    """
    num_groups, num_slots = ids_GS.shape
    position_GS = torch.empty_like(ids_GS, dtype=torch.int32)
    if ids_GS.numel():
        block = min(BLOCK, max(16, triton.next_power_of_2(num_slots)))
        num_blocks = triton.cdiv(num_slots, block)
        # Unused slots are those of one more expert, the last.
        counts = ids_GS.new_empty(num_groups, num_experts + 1, num_blocks, dtype=torch.int32)
        bins = triton.next_power_of_2(num_experts + 1)
        grid, ids_GS = (num_groups * num_blocks,), ids_GS.contiguous()
        count_kernel[grid](
            ids_GS, counts, num_slots, num_experts, num_blocks, BLOCK=block, BLOCK_E=bins
        )
        # Totals are not needed: of the rows it scans, the first 0 are those of experts.
        scan_kernel[(num_groups * (num_experts + 1),)](
            counts, counts, 0, num_blocks, BLOCK_P=scan_block(num_blocks)
        )
        position_kernel[grid](
            ids_GS, counts, position_GS, num_slots, num_experts, num_blocks, BLOCK=block, CHUNK=16
        )
    return position_GS


@triton.jit
def position_kernel(
    ids,
    counts,
    positions,
    num_slots,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the positions of one block of one group: slots of the blocks before, and of its own."""
    group, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    ids += group.to(tl.int64) * num_slots
    counts += group.to(tl.int64) * (num_experts + 1) * num_blocks
    slot = block * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    expert = tl.load(ids + slot, mask=inside, other=-1).to(tl.int32)
    expert = tl.where(expert < 0, num_experts, expert)
    rank = rank_in_block(ids, block * BLOCK, slot, expert, num_slots, num_experts, BLOCK, CHUNK)
    before = tl.load(counts + expert * num_blocks + block)
    tl.store(positions + group.to(tl.int64) * num_slots + slot, before + rank, mask=inside)
