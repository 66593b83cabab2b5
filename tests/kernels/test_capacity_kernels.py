"""Positions in experts by the kernels: those of a sort, and the same slots are served."""

import pytest
import torch
from on_device import DEVICE, twice  # first: it skips this file where Triton is missing

from dmoe.ops import CapacityRule, keep_slots
from dmoe.ops.expert_capacity import positions_torch

kernels = pytest.importorskip("dmoe_kernels.capacity")


def ids_of(groups: int, slots: int, experts: int) -> torch.Tensor:
    """Experts of slots, some unused, the last expert never chosen."""
    generator = torch.Generator().manual_seed(slots)
    return torch.randint(-1, max(1, experts - 1), (groups, slots), generator=generator)


# A group in one block and in several, a whole one and a tail, one slot, none.
@pytest.mark.parametrize(
    ("groups", "slots", "experts"),
    [(1, 700, 5), (3, 300, 64), (5, 12, 4), (2, 256, 8), (7, 1, 1), (0, 4, 3), (2, 0, 3)],
)
def test_positions_are_those_of_a_sort(groups: int, slots: int, experts: int) -> None:
    ids = ids_of(groups, slots, experts)
    (got,) = twice(lambda: [kernels.positions(ids.to(DEVICE), experts)])
    assert torch.equal(got.long().cpu(), positions_torch(ids, experts))


def test_more_blocks_than_a_scan_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "scan_block", lambda _: 2)
    ids = ids_of(2, 1100, 3)
    got = kernels.positions(ids.to(DEVICE), 3)
    assert torch.equal(got.long().cpu(), positions_torch(ids, 3))


@pytest.mark.parametrize("policy", ["position", "score"])
@pytest.mark.parametrize(
    ("tokens", "group_size", "factor", "minimum"),
    [(129, 129, 1.1, 0), (37, 8, 0.5, 2), (37, 100, 1.0, 4), (0, 1, 1.0, 1), (6, 1, 1.0, 0)],
)
def test_serves_the_same_slots(policy, tokens, group_size, factor, minimum) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids_TK = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :3]
    ids_TK[::5, 1:] = -1
    weights_TK = torch.randint(1, 4, ids_TK.shape, generator=generator) / 4  # ties
    rule = CapacityRule(factor, minimum, group_size, policy)
    want = keep_slots(ids_TK, weights_TK, 8, rule)
    inputs = (ids_TK.to(DEVICE), weights_TK.to(DEVICE), 8, rule)
    (got,) = twice(lambda: [keep_slots(*inputs, by_triton=True)])
    assert torch.equal(got.cpu(), want)
