"""What dispatchers hand to experts, and in what precision they send it.

Shapes: N source rows, R routed rows, D model dim.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from dmoe.ops import RowMap, gather

DispatchDtype = Literal["same", "fp8"]


class Rows(NamedTuple):
    """The routed rows x_RD, sorted by local expert, not yet gathered.

    Experts that read their input through the map never write x_RD nor save it for backward; others
    call `gather` and `gather_sum`. They return y_ND: for each source the sum of its rows' outputs
    times their gates, which come along for the same reason.
    """

    x_ND: Tensor
    """(N, D) the rows to read from."""
    map: RowMap
    """From routed rows to source rows."""
    weights_R: Tensor
    """(R,) gate of each routed row."""

    def gather(self) -> Tensor:
        """Return x_RD, (R, D), as a tensor of its own."""
        return gather(self.x_ND, self.map)
