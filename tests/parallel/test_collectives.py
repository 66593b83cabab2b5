"""Rows to and from every rank, with a gradient that travels back; nothing to send is ordinary."""

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel import all_reduce_sum, all_to_all_rows
from dmoe.testing import run_distributed

# Row r: what rank r sends to each rank. Rank 1 sends nothing, rank 2 receives nothing.
COUNTS = [
    [[2, 0, 0], [0, 0, 0], [1, 3, 0]],
    [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
]


def _rows(sender: int, receiver: int, count: int) -> Tensor:
    """Return rows that say where they come from and where they go."""
    place = torch.tensor([sender, receiver], dtype=torch.float64)
    return torch.cat([place.expand(count, 2), torch.arange(count)[:, None]], dim=1)


def _check_collectives() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    for counts in COUNTS:
        send, receive = counts[rank], [counts[sender][rank] for sender in range(3)]
        x = torch.cat([_rows(rank, to, send[to]) for to in range(3)]).requires_grad_()
        y = all_to_all_rows(x, send, receive, group)
        assert torch.equal(y, torch.cat([_rows(by, rank, receive[by]) for by in range(3)]))
        # A gradient that names the receiver comes back to the rows that went there.
        (y * (rank + 1)).sum().backward()
        receivers = torch.arange(1, 4).repeat_interleave(torch.tensor(send))
        assert torch.equal(x.grad, receivers[:, None].expand(-1, 3).double())

    total = torch.tensor([rank, 1])
    assert all_reduce_sum(total, group) is total
    assert total.tolist() == [3, 3]


def test_rows_and_gradients_on_three_ranks() -> None:
    run_distributed(_check_collectives, 3)


def test_a_group_of_one_sends_nothing() -> None:
    x = torch.randn(3, 2)
    assert all_to_all_rows(x, [3], [3], None) is x
    assert all_reduce_sum(x, None) is x
