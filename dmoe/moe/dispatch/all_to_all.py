"""Dispatch over an expert-parallel group by all-to-all with uneven splits.

Each rank sends its rows, sorted by global expert, to the ranks that hold the experts; what arrives
is ordered by sender and is read by local expert through a permutation. Combine goes the same way
back.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.moe.dispatch.quantized import send_quantized
from dmoe.moe.dispatch.rows import DispatchDtype, Rows
from dmoe.moe.routing import Routing
from dmoe.ops import Backend, RowMap, gather, gather_sum, sort_slots, uses_kernels
from dmoe.parallel import all_to_all_rows


class AllToAllHandle(NamedTuple):
    """What `combine` needs to bring the rows back."""

    sent: RowMap
    """From the rows this rank sent to its tokens."""
    send_counts: list[int]
    """Rows sent to each rank of the group."""
    receive_counts: list[int]
    """Rows received from each rank of the group."""


class AllToAllDispatcher:
    """Exchanges rows within `group`; rank r of it holds the experts [r e, (r + 1) e)."""

    def __init__(
        self,
        *,
        num_experts: int,
        group: dist.ProcessGroup,
        backend: Backend = "auto",
        dtype: DispatchDtype = "same",
    ):
        self.num_experts = num_experts
        self.group = group
        self.backend = backend
        self.dtype = dtype
        self.num_local = num_experts // group.size()

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, exact: bool = False
    ) -> tuple[Rows, Tensor, AllToAllHandle]:
        """Return the rows for the local experts, sorted by expert, (e,) counts, and the handle."""
        by_triton = uses_kernels(self.backend, x_TD.device, x_TD.dtype)
        slots_R, sent, counts_E = sort_slots(
            routing.expert_ids_TK, self.num_experts, by_triton=by_triton
        )
        received_Pe = self._exchange_counts(counts_E)
        send_counts = counts_E.view(-1, self.num_local).sum(1).tolist()
        receive_counts = received_Pe.sum(1).tolist()
        slots_R, sent = slots_R[: sum(send_counts)], sent.head(sum(send_counts))
        weights_R = routing.weights_TK.flatten().index_select(0, slots_R)
        route = (send_counts, receive_counts, self.group)
        if self.dtype == "fp8" and not exact:
            x_ND = send_quantized(x_TD, sent, *route, by_triton=by_triton)
        else:
            x_ND = all_to_all_rows(gather(x_TD, sent, by_triton=by_triton), *route)
        weights_N = all_to_all_rows(weights_R, *route)

        received = self._sort_received(received_Pe)
        rows = Rows(x_ND, received, weights_N.index_select(0, received.index_R))
        handle = AllToAllHandle(sent, send_counts, receive_counts)
        return rows, received_Pe.sum(0), handle

    def combine(self, y_ND: Tensor, handle: AllToAllHandle) -> Tensor:
        """Return y_TD, the sum of each token's rows; zero for a token without any."""
        y_SD = all_to_all_rows(y_ND, handle.receive_counts, handle.send_counts, self.group)
        by_triton = uses_kernels(self.backend, y_ND.device, y_ND.dtype)
        return gather_sum(y_SD, handle.sent, by_triton=by_triton)

    def _exchange_counts(self, counts_E: Tensor) -> Tensor:
        """Return (ranks, e): the rows that come from each rank for each local expert."""
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        return received_E.view(-1, self.num_local)

    def _sort_received(self, received_Pe: Tensor) -> RowMap:
        """Return the map that reads the arrived rows, ordered (sender, expert), by expert."""
        expert_of_block = torch.arange(self.num_local, device=received_Pe.device)
        experts = expert_of_block.repeat(received_Pe.shape[0])
        expert_N = experts.repeat_interleave(received_Pe.flatten())
        return RowMap.from_index(expert_N.argsort(stable=True), len(expert_N))
