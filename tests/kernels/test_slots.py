"""The sort of slots by expert: a permutation, the same as torch's stable sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from on_device import DEVICE, twice  # first: it skips this file where Triton is missing

from dmoe.ops import RowMap, sort_slots

pytest.importorskip("dmoe_kernels.slots")


def routings() -> dict[str, tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(0)

    def ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
        return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]

    k_T1 = torch.randint(0, 4, (129, 1), generator=generator)
    return {
        "random": (ids(129, 5, 3), 5),
        "a whole number of blocks": (ids(128, 8, 2), 8),
        "one token, one expert": (ids(1, 1, 1), 1),
        "many experts": (ids(37, 64, 8), 64),
        "a k for each token": (ids(129, 8, 3).masked_fill(torch.arange(3) >= k_T1, -1), 8),
        "holes": (ids(100, 8, 4).where(torch.rand(100, 4, generator=generator) > 0.5, -1), 8),
        "all to the last": (torch.full((300, 1), 6), 7),
        "nothing routed": (torch.full((5, 2), -1), 3),
        "no tokens": (torch.zeros(0, 2, dtype=torch.int64), 3),
    }


def sorted_by_triton(ids_TK: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """Return the slots, the three parts of the row map, and the counts."""
    slots, rows, counts = sort_slots(ids_TK.to(DEVICE), num_experts, by_triton=True)
    return [slots, *rows, counts]


@pytest.mark.parametrize("name", routings())
def test_equals_a_stable_sort(name: str) -> None:
    ids_TK, num_experts = routings()[name]
    slots, *row_map, counts = twice(lambda: sorted_by_triton(ids_TK, num_experts))
    rows = RowMap(*row_map)
    want_slots, want_rows, want_counts = sort_slots(ids_TK, num_experts)
    num_used = len(want_slots)
    assert torch.equal(counts.cpu(), want_counts)
    assert torch.equal(slots[:num_used].cpu(), want_slots)
    assert torch.equal(rows.offsets_N1.cpu(), want_rows.offsets_N1)
    for got, want in zip(rows[:2], want_rows[:2], strict=True):
        assert torch.equal(got[:num_used].cpu(), want)
    # The rest are the unused slots, in their order, of rows that no token has.
    unused = (ids_TK.flatten() < 0).nonzero()[:, 0]
    assert torch.equal(slots[num_used:].cpu(), unused)
    tail = torch.arange(num_used, ids_TK.numel())
    assert torch.equal(rows.by_source_R[num_used:].cpu(), tail)


def test_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than the scan takes at once."""
    monkeypatch.setattr("dmoe_kernels.slots.scan_block", lambda _: 2)
    ids_TK = torch.randint(-1, 7, (700, 2), generator=torch.Generator().manual_seed(0))
    slots, *_ = sort_slots(ids_TK.to(DEVICE), 7, by_triton=True)
    want = ids_TK.flatten().masked_fill(ids_TK.flatten() < 0, 7).argsort(stable=True)
    assert torch.equal(slots.cpu(), want)


@given(
    tokens=st.integers(0, 200),
    experts=st.integers(1, 9),
    k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_is_a_permutation_whose_map_leads_back(
    tokens: int, experts: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, experts, (tokens, k), generator=generator)
    slots, index, by_token, offsets, counts = (t.cpu() for t in sorted_by_triton(ids_TK, experts))
    every = torch.arange(tokens * k)
    assert torch.equal(slots.sort().values, every)
    assert torch.equal(by_token.sort().values, every)
    assert torch.equal(index, slots // k)
    used = ids_TK >= 0
    assert int(counts.sum()) == int(offsets[-1]) == int(used.sum())
    assert torch.equal(offsets.diff(), used.sum(1))
    # The rows of each token, in the order of its slots.
    assert torch.equal(slots[by_token[: int(offsets[-1])]], used.flatten().nonzero()[:, 0])
