"""Routed rows: read N sources into R rows, sum R rows into N; each is the gradient of the other.

Shapes: N sources (tokens), R routed rows, D model dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowMap(NamedTuple):
    """Which source each routed row is read from, and the same seen from the sources.

    Both directions are kept, so that neither needs atomics: sums are in row order on every device.
    """

    index_R: Tensor
    """(R,) int64: the source of each row."""
    by_source_R: Tensor
    """(R,) int64: the row numbers, ordered by source, then by row."""
    offsets_N1: Tensor
    """(N + 1,) int64: where each source's rows begin in `by_source_R`."""

    @classmethod
    def from_index(cls, index_R: Tensor, num_sources: int) -> "RowMap":
        """Build the map from the source of each row."""
        by_source_R = torch.argsort(index_R, stable=True)
        return cls(index_R, by_source_R, offsets_of(torch.bincount(index_R, minlength=num_sources)))

    def contiguous(self) -> "RowMap":
        """Return the map as kernels read it."""
        return RowMap(*(part.contiguous() for part in self))

    def head(self, num_rows: int) -> "RowMap":
        """Return the map of the first rows, where those after them have no source."""
        return RowMap(self.index_R[:num_rows], self.by_source_R[:num_rows], self.offsets_N1)


def offsets_of(counts_N: Tensor) -> Tensor:
    """Return (N + 1,) int64 offsets: zero, then the running sum of `counts_N`."""
    return F.pad(counts_N.cumsum(0), (1, 0))


def gather(x_ND: Tensor, rows: RowMap, *, by_triton: bool = False) -> Tensor:
    """Return x_RD with x_RD[r] = x_ND[index_R[r]]; `by_triton` as in `sum_rows`, its gradient."""
    return _Gather.apply(x_ND, rows, by_triton)


def gather_sum(y_RD: Tensor, rows: RowMap, *, by_triton: bool = False) -> Tensor:
    """Return y_ND, the sum of each source's rows; zero for a source without rows.

    Args:
        y_RD: rows.
        rows: from rows to sources.
        by_triton: use the kernel, which sums in float32.
    """
    return _GatherSum.apply(y_RD, rows, by_triton)


def gather_loop(x_ND: Tensor, rows: RowMap) -> Tensor:
    """Define `gather`, one row at a time."""
    parts = [x_ND[source] for source in rows.index_R.tolist()]
    return torch.stack(parts) if parts else x_ND[:0]


def gather_sum_loop(y_RD: Tensor, rows: RowMap) -> Tensor:
    """Define `gather_sum`, one row at a time."""
    sums = [y_RD[:0].sum(0)] * (len(rows.offsets_N1) - 1)
    for row, source in enumerate(rows.index_R.tolist()):
        sums[source] = sums[source] + y_RD[row]
    return torch.stack(sums) if sums else y_RD[:0]


def take_rows(x_ND: Tensor, rows: RowMap) -> Tensor:
    """Do `gather` without autograd."""
    return x_ND.index_select(0, rows.index_R)


def sum_rows(y_RD: Tensor, rows: RowMap, *, by_triton: bool = False) -> Tensor:
    """Do `gather_sum` without autograd."""
    if by_triton:
        from dmoe_kernels.combine import gather_sum

        rows = rows.contiguous()
        return gather_sum(y_RD.contiguous(), rows.by_source_R, rows.offsets_N1)
    # An embedding bag is this sum: it reads each row once and writes no intermediate (N, K, D).
    return F.embedding_bag(
        rows.by_source_R, y_RD, rows.offsets_N1, mode="sum", include_last_offset=True
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: RowMap, by_triton: bool) -> Tensor:
        ctx.rows, ctx.by_triton = rows, by_triton
        return take_rows(x_ND, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(dy_RD.contiguous(), ctx.rows, by_triton=ctx.by_triton), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, rows: RowMap, by_triton: bool) -> Tensor:
        ctx.rows = rows
        return sum_rows(y_RD, rows, by_triton=by_triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        return take_rows(dy_ND.contiguous(), ctx.rows), None, None
