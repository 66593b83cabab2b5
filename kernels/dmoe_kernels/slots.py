"""Sort slots by expert, and the maps both ways: a counting sort in four launches, no host wait.

Stable, so rows of an expert are in the order of the slots, and exact: no atomics but those of a
histogram of integers. Shapes: T tokens, K slots per token, E experts, P blocks of slots, R = T K
rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Slots that a program counts and places."""


class Slots(NamedTuple):
    """The slots sorted by expert; unused ones (-1) come last, after all that are used."""

    slots_R: Tensor
    """(R,) int64 slot t K + k of each row: a permutation."""
    index_R: Tensor
    """(R,) int64 token of each row."""
    by_token_R: Tensor
    """(R,) int64 rows ordered by slot; those of unused slots come last."""
    offsets_T1: Tensor
    """(T + 1,) int64 where the rows of each token begin in `by_token_R`."""
    counts_E: Tensor
    """(E,) int64 rows of each expert."""


def sort_slots(expert_ids_TK: Tensor, num_experts: int) -> Slots:
    """Sort (T, K) int64 expert ids, -1 where a slot is unused."""
    num_tokens, top_k = expert_ids_TK.shape
    num_slots, device = expert_ids_TK.numel(), expert_ids_TK.device
    num_blocks = triton.cdiv(num_slots, BLOCK)
    maps_3R = torch.empty(3, num_slots, dtype=torch.int64, device=device)
    offsets_T1 = torch.zeros(num_tokens + 1, dtype=torch.int64, device=device)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    if num_slots:
        # Unused slots are those of one more expert, the last.
        counts_XP = torch.empty(num_experts + 1, num_blocks, dtype=torch.int32, device=device)
        starts_X = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
        bins = triton.next_power_of_2(num_experts + 1)
        ids = expert_ids_TK.contiguous()
        count_kernel[(num_blocks,)](
            ids, counts_XP, num_slots, num_experts, num_blocks, BLOCK=BLOCK, BLOCK_E=bins
        )
        scan_kernel[(num_experts + 1,)](
            counts_XP, counts_E, num_experts, num_blocks, BLOCK_P=scan_block(num_blocks)
        )
        starts_kernel[(1,)](counts_E, starts_X, num_experts, BLOCK_E=bins)
        place_kernel[(num_blocks,)](
            ids,
            counts_XP,
            starts_X,
            *maps_3R,
            offsets_T1,
            num_slots,
            num_experts,
            num_blocks,
            num_tokens,
            top_k,
            BLOCK=BLOCK,
            CHUNK=16,
        )
    return Slots(*maps_3R, offsets_T1, counts_E)


def scan_block(num_blocks: int) -> int:
    """Return how many blocks `scan_kernel` takes at once."""
    return min(1024, triton.next_power_of_2(num_blocks))


@triton.jit
def count_kernel(
    ids, counts, num_slots, num_experts, num_blocks, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Count the slots of each expert in one block; the unused ones are counted last.

    Slots may be of several groups, each with counts of its own.
    """
    group, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    ids += group.to(tl.int64) * num_slots
    counts += group.to(tl.int64) * (num_experts + 1) * num_blocks
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    expert = tl.where(expert < 0, num_experts, expert)
    count = tl.histogram(expert, BLOCK_E)
    e = tl.arange(0, BLOCK_E)
    # The last block's places past the end were counted as unused.
    past = tl.maximum((block + 1) * BLOCK - num_slots, 0)
    count -= tl.where(e == num_experts, past, 0)
    tl.store(counts + e * num_blocks + block, count, mask=e <= num_experts)


@triton.jit
def scan_kernel(counts, totals, num_experts, num_blocks, BLOCK_P: tl.constexpr):
    """Replace the counts of one expert by the sums of those of the blocks before."""
    expert = tl.program_id(0)
    row = counts + expert * num_blocks
    total = tl.zeros((), tl.int32)
    for first in range(0, num_blocks, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        count = tl.load(row + p, mask=p < num_blocks, other=0)
        tl.store(row + p, total + tl.cumsum(count) - count, mask=p < num_blocks)
        total += tl.sum(count)
    if expert < num_experts:
        tl.store(totals + expert, total.to(tl.int64))


@triton.jit
def starts_kernel(counts, starts, num_experts, BLOCK_E: tl.constexpr):
    """Write where the rows of each expert begin, and at the end where the unused ones do."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts + e, mask=e < num_experts, other=0)
    tl.store(starts + e, tl.cumsum(count) - count, mask=e <= num_experts)


@triton.jit
def rank_in_block(
    ids, first, slot, expert, num_slots, num_experts, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Return how many slots of the block from `first` on go before each, of the same expert."""
    rank = tl.zeros((BLOCK,), tl.int32)
    for chunk in range(0, BLOCK, CHUNK):
        other = first + chunk + tl.arange(0, CHUNK)
        other_expert = tl.load(ids + other, mask=other < num_slots, other=-1).to(tl.int32)
        other_expert = tl.where(other_expert < 0, num_experts, other_expert)
        before = (other[None, :] < slot[:, None]) & (other_expert[None, :] == expert[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    return rank


@triton.jit
def place_kernel(
    ids,
    counts,
    starts,
    slots,
    index,
    by_token,
    offsets,
    num_slots,
    num_experts,
    num_blocks,
    num_tokens,
    top_k,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write each slot of one block to its row, and its row to its place in the order of slots."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    expert = tl.load(ids + slot, mask=inside, other=-1).to(tl.int32)
    used = expert >= 0
    expert = tl.where(used, expert, num_experts)
    rank = rank_in_block(ids, block * BLOCK, slot, expert, num_slots, num_experts, BLOCK, CHUNK)
    row = tl.load(starts + expert) + tl.load(counts + expert * num_blocks + block) + rank
    # Used slots keep their order, so those before are all before but the unused.
    unused_before = tl.load(counts + num_experts * num_blocks + block)
    num_used = tl.load(starts + num_experts)
    used_here = (used & inside).to(tl.int32)
    used_before = block * BLOCK - unused_before + tl.cumsum(used_here) - used_here
    place = tl.where(used, used_before, num_used + slot - used_before)
    tl.store(slots + row, slot.to(tl.int64), mask=inside)
    tl.store(index + row, (slot // top_k).to(tl.int64), mask=inside)
    tl.store(by_token + place, row, mask=inside)
    is_first = inside & (slot % top_k == 0)
    tl.store(offsets + slot // top_k, used_before.to(tl.int64), mask=is_first)
    if block == 0:
        tl.store(offsets + num_tokens, num_used)
