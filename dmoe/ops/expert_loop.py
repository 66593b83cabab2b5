"""Grouped GEMM as one product an expert, for what oneDNN multiplies on a CPU and for float64.

oneDNN compiles a product for each shape that it meets, which takes longer than the product itself,
and an expert hardly ever has as many rows again. So a product takes an expert's rows and such as
follow them, up to a multiple of 32. Called by `grouped_mm` and `grouped_outer`, whose arguments
these are. Shapes: R routed rows, E groups, and M, N for the other sizes.

A batched product of several experts is faster where a CPU has matrix units (AMX), but wants as many
rows of each. Zeros after the rows of the smaller ones pay where tokens are spread evenly, and no
longer where they are as uneven as in training: so that was left out.
"""

import torch.nn.functional as F
from torch import Tensor

from dmoe.ops import matmul

_ROWS = 32


def grouped_mm_by_expert(x_RM: Tensor, w_EMN: Tensor, counts_E: Tensor) -> Tensor:
    """Return (R, N): each expert's rows times its matrix."""
    y_RN = x_RM.new_empty(len(x_RM), w_EMN.shape[2])
    for place, w_MN in zip(_places(counts_E, x_RM), w_EMN, strict=True):
        # What follows an expert's rows is overwritten by the expert that has them.
        y, rows, w = y_RN[place.start : place.stop], _rows(x_RM, place), w_MN.to(x_RM.dtype)
        if len(y) == len(rows):
            matmul.mm(rows, w, out=y)
        else:
            y.copy_(matmul.mm(rows, w)[: len(y)])
    return y_RN


def grouped_outer_by_expert(a_RM: Tensor, b_RN: Tensor, counts_E: Tensor) -> Tensor:
    """Return (E, M, N): a^T b over the rows of each expert, zero where it has none."""
    out_EMN = a_RM.new_empty(len(counts_E), a_RM.shape[1], b_RN.shape[1])
    for place, count, out_MN in zip(
        _places(counts_E, a_RM), counts_E.tolist(), out_EMN, strict=True
    ):
        # What follows an expert's rows on one side meets zeros on the narrower one.
        own = slice(place.start, place.start + count)
        if a_RM.shape[1] < b_RN.shape[1]:
            a, b = _filled(a_RM[own], len(place)), _rows(b_RN, place)
        else:
            a, b = _rows(a_RM, place), _filled(b_RN[own], len(place))
        matmul.outer(a, b, out=out_MN)
    return out_EMN


def _places(counts_E: Tensor, rows: Tensor) -> list[range]:
    """Return the rows that the product of each expert takes."""
    shapes_cost = rows.dtype.itemsize < 4 or matmul.by_onednn(rows.device, rows.dtype)
    multiple = _ROWS if shapes_cost else 1
    places, start = [], 0
    for count in counts_E.tolist():
        places.append(range(start, start + -(-count // multiple) * multiple))
        start += count
    return places


def _rows(values: Tensor, place: range) -> Tensor:
    """Return the rows of a place, zeros where there are no more."""
    return _filled(values[place.start : place.stop], len(place))


def _filled(rows: Tensor, length: int) -> Tensor:
    """Return rows with zeros up to a length."""
    return F.pad(rows, (0, 0, 0, length - len(rows))) if len(rows) < length else rows
