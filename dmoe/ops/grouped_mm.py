"""Grouped GEMM: one matrix product per expert over rows that are sorted by expert.

Shapes: R routed rows, E groups, and M, N for the two other sizes. The twin loops over the groups.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "torch", "loop"]

# Dtypes that torch's grouped GEMM takes; float64, which proofs use, is a loop on every backend.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve_backend(backend: Backend) -> Literal["torch", "loop"]:
    """Return the backend that "auto" stands for on this machine."""
    return "torch" if backend == "auto" else backend


def grouped_mm(x_RM: Tensor, w_EMN: Tensor, counts_E: Tensor, *, backend: Backend) -> Tensor:
    """Multiply each group's rows with the group's matrix.

    Args:
        x_RM: rows, sorted by group.
        w_EMN: one matrix a group; a transposed view is fine.
        counts_E: int64 rows of each group; they must sum to R.
        backend: "torch" for `torch.nn.functional.grouped_mm`, "loop" for its twin.

    Returns:
        (R, N) rows. No gradient: the ops that call this know cheaper ones than autograd's.
    """
    if resolve_backend(backend) == "torch" and x_RM.dtype in _GROUPED_DTYPES:
        return F.grouped_mm(x_RM, w_EMN, offs=_ends(counts_E))
    y_RN = x_RM.new_empty(x_RM.shape[0], w_EMN.shape[2])
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        torch.mm(x_RM[rows], w_EMN[expert], out=y_RN[rows])
        start += count
    return y_RN


def grouped_outer(a_RM: Tensor, b_RN: Tensor, counts_E: Tensor, *, backend: Backend) -> Tensor:
    """Return (E, M, N): a^T b of each group, zero where empty; the gradient of the weights."""
    if resolve_backend(backend) == "torch" and a_RM.dtype in _GROUPED_DTYPES:
        return F.grouped_mm(a_RM.t(), b_RN, offs=_ends(counts_E))
    w_EMN = a_RM.new_empty(len(counts_E), a_RM.shape[1], b_RN.shape[1])
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        torch.mm(a_RM[rows].t(), b_RN[rows], out=w_EMN[expert])
        start += count
    return w_EMN


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)
