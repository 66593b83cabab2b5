"""Tokens to the places of their experts and back, against loops, with gradients."""

import pytest
import torch
from torch import Tensor

from dmoe.ops import CapacityRule, from_buffers, keep_slots, places_of, to_buffers
from dmoe.ops.buffers import from_buffers_loop, to_buffers_loop

IDS = [
    [[2, 0], [-1, 2], [0, -1]],
    [[1, -1], [1, -1], [1, -1], [-1, -1]],
    [[-1, -1]],
    [],
]


def ids_of(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2)


def test_places_by_hand() -> None:
    """Expert 0 has tokens 0 and 2, expert 2 tokens 0 and 1; there are three places of each."""
    places = places_of(ids_of(IDS[0]), 3, 3)
    assert places.token_P.tolist() == [0, 2, -1, -1, -1, -1, 0, 1, -1]
    assert places.slot_P.tolist() == [1, 4, -1, -1, -1, -1, 0, 3, -1]
    assert places.counts_E.tolist() == [2, 0, 2]
    assert places.offsets_T1.tolist() == [0, 2, 3, 4]
    assert sorted(places.by_token_R[:2].tolist()) == [0, 6]
    assert places.by_token_R[2:].tolist() == [7, 1]


@pytest.mark.parametrize("rows", IDS)
def test_there_and_back_equal_the_loops(rows: list[list[int]]) -> None:
    places = places_of(ids_of(rows), 3, 3)
    for op, twin, size, out in (
        (to_buffers, to_buffers_loop, len(rows), 9),
        (from_buffers, from_buffers_loop, 9, len(rows)),
    ):
        x = torch.randn(size, 4, dtype=torch.float64, requires_grad=True)
        dy = torch.randn(out, 4, dtype=torch.float64)
        y, want = op(x, places), twin(x, places) + 0 * x.sum()
        torch.testing.assert_close(y, want, rtol=1e-14, atol=1e-14)
        if not rows:
            continue
        (dx,), (want,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy)
        torch.testing.assert_close(dx, want, rtol=1e-14, atol=1e-14)


def test_what_lies_in_an_empty_place_is_not_read() -> None:
    places = places_of(ids_of(IDS[0]), 3, 3)
    y_PD = to_buffers(torch.randn(3, 4), places)
    y_PD[places.token_P < 0] = torch.nan
    assert from_buffers(y_PD, places).isfinite().all()


@pytest.mark.parametrize("group_size", [1, 4, 7, 20, 100])
@pytest.mark.parametrize(("factor", "minimum"), [(0.5, 0), (1.0, 2), (1.3, 0), (9.0, 1)])
def test_no_expert_serves_more_than_its_places(
    factor: float, minimum: int, group_size: int
) -> None:
    """Also where all tokens choose alike, and some have fewer experts."""
    torch.manual_seed(0)
    for ids_TK in (torch.arange(3).expand(20, 3), torch.rand(20, 6).argsort(1)[:, :3]):
        rule = CapacityRule(factor, minimum, group_size, "position")
        ids_TK = ids_TK.masked_fill(torch.rand(20, 3) < 0.2, -1)
        served = keep_slots(ids_TK, torch.rand(20, 3), 6, rule)
        counts = torch.bincount(served[served >= 0], minlength=6)
        assert counts.max() <= rule.num_places(20, 3, 6)
    full = torch.arange(3).expand(20, 3)
    counts = torch.bincount(
        keep_slots(full, torch.rand(20, 3), 6, rule).clamp(min=-1).flatten() + 1
    )
    if 20 % group_size == 0:
        assert counts[1] == rule.num_places(20, 3, 6), "as many as there are places, not fewer"


@pytest.mark.parametrize(("factor", "num_experts"), [(0.55, 5), (1.1, 10)])
def test_places_are_rounded_as_capacity_is(factor: float, num_experts: int) -> None:
    """Of these the product comes out just above a whole number in one order, and not in another."""
    full = torch.arange(5).expand(20, 5)
    rule = CapacityRule(factor, 0, 20, "position")
    served = (keep_slots(full, torch.rand(20, 5), num_experts, rule) == 0).sum()
    assert served == rule.num_places(20, 5, num_experts)
