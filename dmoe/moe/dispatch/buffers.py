"""Dispatch in buffers of a fixed size: C places for each expert on each rank, full or not.

What GShard (arXiv 2006.16668) and Switch do under a capacity. Each rank sends each other one the
same number of rows, so no size has to be known before, and with the kernels the host does not wait
for the device. Empty places are sent, but no expert computes them.
Shapes: T tokens, E experts, e local experts, C places, P ranks, N = P e C rows that arrive.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.moe.dispatch.rows import Rows
from dmoe.moe.routing import Routing
from dmoe.ops import Backend, Places, RowMap, from_buffers, places_of, to_buffers, uses_kernels
from dmoe.ops.rows import offsets_of
from dmoe.parallel import all_to_all_rows


class BufferDispatcher:
    """Exchanges buffers within `group`; rank r of it holds the experts [r e, (r + 1) e).

    Args:
        num_experts: E.
        group: None where all experts are here.
        backend: of the layer.
    """

    def __init__(
        self, *, num_experts: int, group: dist.ProcessGroup | None, backend: Backend = "auto"
    ):
        self.num_experts, self.group, self.backend = num_experts, group, backend
        self.num_ranks = group.size() if group else 1

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, exact: bool = False
    ) -> tuple[Rows, Tensor, tuple[Places, int]]:
        """Return the rows for the local experts, sorted by expert, (e,) counts, and the handle."""
        by_triton = uses_kernels(self.backend, x_TD.device, x_TD.dtype)
        num_places = routing.num_places
        assert num_places is not None, "buffers are sized by a capacity"
        places = places_of(routing.expert_ids_TK, self.num_experts, num_places, by_triton=by_triton)
        # The gate of an empty place is one more, 0; there may be no slot at all.
        gates = torch.cat((routing.weights_TK.flatten(), routing.weights_TK.new_zeros(1)))
        slot_P = places.slot_P.where(places.slot_P >= 0, len(gates) - 1)
        weights_P = gates.index_select(0, slot_P)
        size = self.num_experts // self.num_ranks * num_places
        x_ND = self._exchange(to_buffers(x_TD, places, by_triton=by_triton), size)
        weights_N = self._exchange(weights_P, size)
        received_Pe = self._counts(places.counts_E)
        rows, counts_e = _filled_rows(received_Pe, num_places), received_Pe.sum(0)
        if not by_triton:
            rows = rows.head(int(counts_e.sum()))
        return Rows(x_ND, rows, weights_N.index_select(0, rows.index_R)), counts_e, (places, size)

    def combine(self, y_ND: Tensor, handle: tuple[Places, int]) -> Tensor:
        """Return y_TD, the sum of each token's places; zero for a token without any."""
        places, size = handle
        by_triton = uses_kernels(self.backend, y_ND.device, y_ND.dtype)
        return from_buffers(self._exchange(y_ND, size), places, by_triton=by_triton)

    def _exchange(self, x: Tensor, size: int) -> Tensor:
        """Send `size` rows to each rank, as they lie, and return what comes from each."""
        sizes = [size] * self.num_ranks
        return all_to_all_rows(x, sizes, sizes, self.group)

    def _counts(self, counts_E: Tensor) -> Tensor:
        """Return (P, e): the rows that come from each rank for each local expert."""
        if self.group is None:
            return counts_E[None]
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        return received_E.view(self.num_ranks, -1)


def _filled_rows(received_Pe: Tensor, num_places: int) -> RowMap:
    """Return the map that reads the places that are filled by expert, and then those that are not.

    The latter belong to no row: they come after the sum of the counts.
    """
    num_ranks, num_local = received_Pe.shape
    place_C = torch.arange(num_places, device=received_Pe.device)
    filled_N = (place_C < received_Pe[:, :, None]).flatten()
    expert_e1 = torch.arange(num_local, device=received_Pe.device)[:, None]
    expert_N = expert_e1.expand(num_ranks, num_local, num_places).flatten()
    index_N = expert_N.where(filled_N, num_local).argsort(stable=True)
    row_of_place = torch.empty_like(index_N)
    row_of_place[index_N] = torch.arange(len(index_N), device=index_N.device)
    by_place = row_of_place[filled_N.logical_not().to(torch.uint8).argsort(stable=True)]
    return RowMap(index_N, by_place, offsets_of(filled_N.long()))
