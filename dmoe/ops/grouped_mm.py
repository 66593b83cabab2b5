"""Grouped GEMM: one matrix product per expert over rows that are sorted by expert.

Rows may be read through an index, so that their gathered copy need not be written. Shapes: N source
rows, R routed rows, E groups, and M, N for the two other sizes of a product.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "torch", "loop"]

# Dtypes that torch's grouped GEMM takes; float64, which proofs use, is a loop on every backend.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# From so many groups on, a loop in Python takes longer than gathering rows for torch's own.
_MANY_GROUPS = 64


def resolve_backend(
    backend: Backend, device: torch.device, num_groups: int
) -> Literal["torch", "loop"]:
    """Return the backend that "auto" stands for on a device, for so many groups (local experts).

    On a CPU torch's grouped GEMM is a loop too, but one that needs the rows gathered beforehand.
    """
    if backend == "auto":
        return "loop" if device.type == "cpu" and num_groups < _MANY_GROUPS else "torch"
    return backend


def grouped_mm(
    x_RM: Tensor,
    w_EMN: Tensor,
    counts_E: Tensor,
    *,
    index_R: Tensor | None = None,
    backend: Backend,
) -> Tensor:
    """Multiply each group's rows with the group's matrix.

    Args:
        x_RM: rows, sorted by group; with `index_R` the sources that it reads rows from.
        w_EMN: one matrix a group, cast to the rows' dtype; a transposed view is fine.
        counts_E: int64 rows of each group; they must sum to R.
        index_R: the source of each row, or None.
        backend: "torch" for `torch.nn.functional.grouped_mm`, "loop" for a product a group.

    Returns:
        (R, N) rows. No gradient: the ops that call this know cheaper ones than autograd's.
    """
    if is_loop(x_RM, counts_E, backend):
        counts = counts_E.tolist()
        y_RN = x_RM.new_empty(sum(counts), w_EMN.shape[2])
        groups = zip(_groups(x_RM, counts, index_R), w_EMN, y_RN.split(counts), strict=True)
        for x, w, y in groups:
            torch.mm(x, w.to(x.dtype), out=y)
        return y_RN
    return F.grouped_mm(_gathered(x_RM, index_R), w_EMN.to(x_RM.dtype), offs=_ends(counts_E))


def grouped_outer(
    a_RM: Tensor,
    b_RN: Tensor,
    counts_E: Tensor,
    *,
    a_index_R: Tensor | None = None,
    b_index_R: Tensor | None = None,
    dtype: torch.dtype,
    backend: Backend,
) -> Tensor:
    """Return (E, M, N) in `dtype`: a^T b of each group, zero where empty; a weight's gradient.

    Args:
        a_RM: rows, sorted by group; with `a_index_R` the sources that it reads rows from.
        b_RN: as `a_RM`.
        counts_E: int64 rows of each group; they must sum to R.
        a_index_R: the source of each row of a, or None.
        b_index_R: the source of each row of b, or None.
        dtype: of the result; the product is computed in that of the rows.
        backend: as for `grouped_mm`.
    """
    if is_loop(a_RM, counts_E, backend):
        counts = counts_E.tolist()
        w_EMN = a_RM.new_empty(len(counts), a_RM.shape[1], b_RN.shape[1], dtype=dtype)
        groups = zip(
            _groups(a_RM, counts, a_index_R), _groups(b_RN, counts, b_index_R), w_EMN, strict=True
        )
        for a, b, w in groups:
            if dtype == a.dtype:
                torch.mm(a.t(), b, out=w)
            else:
                w.copy_(a.t() @ b)
        return w_EMN
    a_RM, b_RN = _gathered(a_RM, a_index_R), _gathered(b_RN, b_index_R)
    return F.grouped_mm(a_RM.t(), b_RN, offs=_ends(counts_E)).to(dtype)


def is_loop(x_RM: Tensor, counts_E: Tensor, backend: Backend) -> bool:
    """Say whether products of the rows `x_RM` are computed a group at a time."""
    backend = resolve_backend(backend, x_RM.device, len(counts_E))
    return backend == "loop" or x_RM.dtype not in _GROUPED_DTYPES


def _gathered(x: Tensor, index_R: Tensor | None) -> Tensor:
    return x if index_R is None else x.index_select(0, index_R)


def _groups(x: Tensor, counts: list[int], index_R: Tensor | None) -> Iterator[Tensor]:
    """Yield the rows of each group; gathered ones in one buffer, valid until the next group."""
    if index_R is None:
        yield from x.split(counts)
        return
    # A group's rows stay in the cache between the gather and the product that reads them.
    buffer = x.new_empty(max(counts), x.shape[1])
    for index in index_R.split(counts):
        yield torch.index_select(x, 0, index, out=buffer[: len(index)])


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)
