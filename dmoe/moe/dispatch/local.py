"""Dispatch inside one process: the experts of the layer are all here."""

from torch import Tensor

from dmoe.moe.dispatch.rows import Rows, sort_slots
from dmoe.moe.routing import Routing
from dmoe.ops import RowMap, gather_sum


class LocalDispatcher:
    """Sorts slots by expert; nothing is sent. The handle is the map from rows to tokens."""

    def __init__(self, *, num_experts: int):
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Rows, Tensor, RowMap]:
        """Return the rows sorted by expert, (E,) counts, and the handle for `combine`."""
        slots_R, rows, counts_E = sort_slots(routing.expert_ids_TK, self.num_experts)
        weights_R = routing.weights_TK.flatten()[slots_R]
        return Rows(x_TD, rows, weights_R), counts_E, rows

    def combine(self, y_RD: Tensor, handle: RowMap) -> Tensor:
        """Return y_TD, the sum of each token's rows; zero for a token without any."""
        return gather_sum(y_RD, handle)
