"""Grouped GEMM: one matrix product per expert over rows that are sorted by expert.

Shapes: R routed rows, E groups, and M, N for the two other sizes of a product.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.triton_experts import check_triton

Backend = Literal["auto", "triton", "torch", "loop"]

# Dtypes that torch's grouped GEMM takes; float64, which proofs use, is a loop on every backend.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# From so many groups on, a loop in Python takes longer than writing whole rows for torch's own.
_MANY_GROUPS = 64


def resolve_backend(
    backend: Backend, device: torch.device, num_groups: int, dtype: torch.dtype = torch.float32
) -> Literal["triton", "torch", "loop"]:
    """Return the backend that is used on a device, for so many groups (local experts).

    On a CPU torch's grouped GEMM is a loop over the experts too, but one for each product. "auto"
    is never "triton" until its kernels have been measured on a GPU. Rows in float64 are always
    worked by "loop".

    Raises:
        ConfigError: "triton" where its kernels cannot run.
    """
    if backend == "triton":
        check_triton(device)
    if dtype not in _GROUPED_DTYPES:
        return "loop"
    if backend != "auto":
        return backend
    return "loop" if device.type == "cpu" and num_groups < _MANY_GROUPS else "torch"


def grouped_mm(x_RM: Tensor, w_EMN: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each group's rows with the group's matrix.

    Args:
        x_RM: rows, sorted by group.
        w_EMN: one matrix a group, cast to the rows' dtype; a transposed view is fine.
        counts_E: int64 rows of each group; they must sum to R.

    Returns:
        (R, N) rows. No gradient: the ops that call this know cheaper ones than autograd's.
    """
    return F.grouped_mm(x_RM, w_EMN.to(x_RM.dtype), offs=_ends(counts_E))


def grouped_mm_loop(x_RM: Tensor, w_EMN: Tensor, counts_E: Tensor) -> Tensor:
    """Define `grouped_mm`."""
    groups = zip(x_RM.split(counts_E.tolist()), w_EMN, strict=True)
    return torch.cat([x @ w.to(x.dtype) for x, w in groups])


def grouped_outer(a_RM: Tensor, b_RN: Tensor, counts_E: Tensor) -> Tensor:
    """Return (E, M, N): a^T b of each group, zero where empty; the gradient of a weight.

    Args:
        a_RM: rows, sorted by group.
        b_RN: as `a_RM`.
        counts_E: int64 rows of each group; they must sum to R.
    """
    return F.grouped_mm(a_RM.t(), b_RN, offs=_ends(counts_E))


def grouped_outer_loop(a_RM: Tensor, b_RN: Tensor, counts_E: Tensor) -> Tensor:
    """Define `grouped_outer`."""
    counts = counts_E.tolist()
    groups = zip(a_RM.split(counts), b_RN.split(counts), strict=True)
    return torch.stack([a.t() @ b for a, b in groups])


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)
