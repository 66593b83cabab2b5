"""Grouped GEMM: one matrix product per expert over rows that are sorted by expert.

Shapes: R routed rows, E groups, and M, N for the two other sizes of a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.backend import ResolvedBackend
from dmoe.ops.expert_loop import grouped_mm_by_expert, grouped_outer_by_expert
from dmoe.ops.megablocks_gemm import grouped_mm_by_megablocks, grouped_outer_by_megablocks


def grouped_mm(
    x_RM: Tensor, w_EMN: Tensor, counts_E: Tensor, backend: ResolvedBackend = "torch"
) -> Tensor:
    """Multiply each group's rows with the group's matrix.

    Args:
        x_RM: rows, sorted by group.
        w_EMN: one matrix a group, cast to the rows' dtype; a transposed view is fine.
        counts_E: int64 rows of each group; they must sum to R.
        backend: "torch", "loop" or "megablocks".

    Returns:
        (R, N) rows. No gradient: the ops that call this know cheaper ones than autograd's.
    """
    if backend == "loop":
        return grouped_mm_by_expert(x_RM, w_EMN, counts_E)
    if backend == "megablocks":
        return grouped_mm_by_megablocks(x_RM, w_EMN.to(x_RM.dtype), counts_E)
    return F.grouped_mm(x_RM, w_EMN.to(x_RM.dtype), offs=_ends(counts_E))


def grouped_mm_loop(x_RM: Tensor, w_EMN: Tensor, counts_E: Tensor) -> Tensor:
    """Define `grouped_mm`."""
    groups = zip(x_RM.split(counts_E.tolist()), w_EMN, strict=True)
    return torch.cat([x @ w.to(x.dtype) for x, w in groups])


def grouped_outer(
    a_RM: Tensor, b_RN: Tensor, counts_E: Tensor, backend: ResolvedBackend = "torch"
) -> Tensor:
    """Return (E, M, N): a^T b of each group, zero where empty; the gradient of a weight.

    Args:
        a_RM: rows, sorted by group.
        b_RN: as `a_RM`.
        counts_E: int64 rows of each group; they must sum to R.
        backend: "torch", "loop" or "megablocks".
    """
    if backend == "loop":
        return grouped_outer_by_expert(a_RM, b_RN, counts_E)
    if backend == "megablocks":
        return grouped_outer_by_megablocks(a_RM, b_RN, counts_E)
    return F.grouped_mm(a_RM.t(), b_RN, offs=_ends(counts_E))


def grouped_outer_loop(a_RM: Tensor, b_RN: Tensor, counts_E: Tensor) -> Tensor:
    """Define `grouped_outer`."""
    counts = counts_E.tolist()
    groups = zip(a_RM.split(counts), b_RN.split(counts), strict=True)
    return torch.stack([a.t() @ b for a, b in groups])


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)
