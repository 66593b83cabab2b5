"""Dispatch inside one process: the experts of the layer are all here."""

from torch import Tensor

from dmoe.moe.dispatch.quantized import round_rows
from dmoe.moe.dispatch.rows import DispatchDtype, Rows
from dmoe.moe.routing import Routing
from dmoe.ops import Backend, sort_slots, uses_kernels


class LocalDispatcher:
    """Sorts slots by expert; nothing is sent, so the sources are the tokens and need no handle."""

    def __init__(
        self, *, num_experts: int, backend: Backend = "auto", dtype: DispatchDtype = "same"
    ):
        self.num_experts = num_experts
        self.backend = backend
        self.dtype = dtype

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, exact: bool = False
    ) -> tuple[Rows, Tensor, None]:
        """Return the rows sorted by expert and (E,) counts."""
        by_triton = uses_kernels(self.backend, x_TD.device, x_TD.dtype)
        slots_R, rows, counts_E = sort_slots(
            routing.expert_ids_TK, self.num_experts, by_triton=by_triton
        )
        if self.dtype == "fp8" and not exact:
            x_TD = round_rows(x_TD, by_triton=by_triton)
        weights_R = routing.weights_TK.flatten().index_select(0, slots_R)
        return Rows(x_TD, rows, weights_R), counts_E, None

    def combine(self, y_ND: Tensor, handle: None) -> Tensor:
        """Return `y_ND`: the experts have summed the rows of each token."""
        return y_ND
