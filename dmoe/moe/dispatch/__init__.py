"""Dispatchers: bring each token's row to its experts and the results back.

`dispatch(x_TD, routing) -> (rows, counts_e, handle)` and `combine(y_ND, handle) -> y_TD`; stateless
between the two but for the handle.
"""

from typing import Any, Literal, Protocol

from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.moe.dispatch.all_to_all import AllToAllDispatcher, AllToAllHandle
from dmoe.moe.dispatch.buffers import BufferDispatcher
from dmoe.moe.dispatch.local import LocalDispatcher
from dmoe.moe.dispatch.rows import DispatchDtype, Rows
from dmoe.moe.routing import Routing
from dmoe.ops import Backend
from dmoe.parallel import ParallelDims

DispatchName = Literal["auto", "local", "all_to_all", "buffers"]


class Dispatcher(Protocol):
    """The seam that every way of communication implements."""

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, exact: bool = False
    ) -> tuple[Rows, Tensor, Any]:
        """Return rows sorted by local expert, (e,) counts and a handle; `exact` rows not in fp8."""
        ...

    def combine(self, y_ND: Tensor, handle: Any) -> Tensor:
        """Return y_TD from what the experts made of each source row."""
        ...


def build_dispatcher(
    name: DispatchName,
    *,
    num_experts: int,
    dims: ParallelDims,
    backend: Backend = "auto",
    dtype: DispatchDtype = "same",
) -> Dispatcher:
    """Build the dispatcher; "auto" is "local" on one rank and "all_to_all" on several.

    An exchange within a group of one rank sends nothing: "all_to_all" is "local" there. Rows are
    rounded to `dtype` all the same, so that numbers do not depend on the layout.

    Raises:
        ConfigError: "local" with experts on several ranks.
    """
    if name == "buffers":
        return BufferDispatcher(num_experts=num_experts, group=dims.ep_group, backend=backend)
    if dims.ep_group is None:
        return LocalDispatcher(num_experts=num_experts, backend=backend, dtype=dtype)
    if name == "local":
        raise ConfigError(
            f"model.moe.dispatch = local cannot reach experts on other ranks, but parallel.ep = "
            f"{dims.ep}: set model.moe.dispatch to auto or all_to_all",
            key="model.moe.dispatch",
        )
    return AllToAllDispatcher(
        num_experts=num_experts, group=dims.ep_group, backend=backend, dtype=dtype
    )


__all__ = [
    "AllToAllDispatcher",
    "AllToAllHandle",
    "BufferDispatcher",
    "DispatchDtype",
    "DispatchName",
    "Dispatcher",
    "LocalDispatcher",
    "Rows",
    "build_dispatcher",
]
