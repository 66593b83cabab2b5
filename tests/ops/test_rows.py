import pytest
import torch

from dmoe.ops.rows import RowMap, gather, gather_loop, gather_sum, gather_sum_loop

INDICES = [[2, 0, 2, 1, 2], [], [3], [0, 0, 0]]


@pytest.mark.parametrize("index", INDICES)
def test_gather_and_its_gradient_equal_the_loop(index) -> None:
    rows = RowMap.from_index(torch.tensor(index, dtype=torch.int64), 4)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(len(index), 3, dtype=torch.float64)
    y, twin = gather(x, rows), gather_loop(x, rows)
    assert torch.equal(y, twin)
    (dx,), (twin_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(twin, x, dy)
    torch.testing.assert_close(dx, twin_dx, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("index", INDICES)
def test_gather_sum_and_its_gradient_equal_the_loop(index) -> None:
    rows = RowMap.from_index(torch.tensor(index, dtype=torch.int64), 4)
    y = torch.randn(len(index), 3, dtype=torch.float64, requires_grad=True)
    dx = torch.randn(4, 3, dtype=torch.float64)
    x, twin = gather_sum(y, rows), gather_sum_loop(y, rows)
    torch.testing.assert_close(x, twin, rtol=1e-14, atol=1e-14)
    if index:
        (dy,), (twin_dy,) = torch.autograd.grad(x, y, dx), torch.autograd.grad(twin, y, dx)
        assert torch.equal(dy, twin_dy)


def test_no_sources() -> None:
    rows = RowMap.from_index(torch.zeros(0, dtype=torch.int64), 0)
    nothing = torch.zeros(0, 3)
    for op in (gather, gather_loop, gather_sum, gather_sum_loop):
        assert op(nothing, rows).shape == (0, 3)
