"""Collectives used by the layers; a group of None is a group of one rank, and costs nothing."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(
    x_RD: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Send consecutive rows to each rank of the group and return the rows received, by sender.

    Args:
        x_RD: (sum(send_counts), ...) rows in the order of the receivers.
        send_counts: rows for each rank; may be zero.
        receive_counts: rows from each rank; may be zero.
        group: the ranks; every one of them must call, also with nothing to send.

    Returns:
        (sum(receive_counts), ...) rows; the gradient travels the opposite way.
    """
    if group is None:
        return x_RD
    return _AllToAllRows.apply(x_RD, send_counts, receive_counts, group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `x` over the group in place and return it; no gradient."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.counts, ctx.group = (send_counts, receive_counts), group
        return _exchange(x_RD, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None, None]:
        send_counts, receive_counts = ctx.counts
        return _exchange(dy_RD, receive_counts, send_counts, ctx.group), None, None, None


def _exchange(
    x_RD: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    y_RD = x_RD.new_empty(sum(receive_counts), *x_RD.shape[1:])
    dist.all_to_all_single(y_RD, x_RD.contiguous(), receive_counts, send_counts, group=group)
    return y_RD
