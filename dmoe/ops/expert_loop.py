"""The expert network an expert after the other: what a CPU does best in narrow dtypes.

What an expert makes on the way stays in the cache for its next product, and the source rows are
gathered into the same small buffer for all. Called by `expert_ffn` alone, whose arguments these
are. Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else
F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.activation import Activation, activate, activate_backward

# A product of narrow numbers is compiled for each shape that it meets, which takes longer than the
# product itself, and an expert hardly ever has as many rows again.
_NARROW_ROWS = 32


def forward_by_expert(
    x_ND: Tensor,
    index_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Return the pre-activation z_RH and the output y_RD of each row."""
    counts, dtype = counts_E.tolist(), x_ND.dtype
    num_rows, dim = len(index_R), x_ND.shape[1]
    z_RH, y_RD = x_ND.new_empty(num_rows, w_up.shape[1]), x_ND.new_empty(num_rows, dim)
    x_buffer = x_ND.new_empty(max(counts), dim)
    for w1, w2, index, weights, z, y in zip(
        w_up,
        w_down_EDF,
        *(rows.split(counts) for rows in (index_R, weights_R[:, None], z_RH, y_RD)),
        strict=True,
    ):
        x = torch.index_select(x_ND, 0, index, out=x_buffer[: len(index)])
        _product(x, w1.t().to(dtype), out=z)
        _product(activate(z, activation).mul_(weights), w2.t().to(dtype), out=y)
    return z_RH, y_RD


def backward_by_expert(
    dy_ND: Tensor,
    x_ND: Tensor,
    index_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    z_RH: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of each row's input and gate, dx_RD and dweights_R, and of both weights.

    Args:
        dy_ND: gradient of the output, contiguous.
        z_RH: what the forward pass returned; None to compute each expert's again.
    """
    counts, dtype = counts_E.tolist(), x_ND.dtype
    dx_RD, dweights_R = x_ND.new_empty(len(index_R), x_ND.shape[1]), torch.empty_like(weights_R)
    dw_up, dw_down_EDF = torch.empty_like(w_up), torch.empty_like(w_down_EDF)
    x_buffer = x_ND.new_empty(max(counts), x_ND.shape[1])
    dy_buffer = torch.empty_like(x_buffer)
    z_of_experts = [None] * len(counts) if z_RH is None else z_RH.split(counts)
    for w1, w2, dw1, dw2, z, index, weights, dx, dweights in zip(
        w_up,
        w_down_EDF,
        dw_up,
        dw_down_EDF,
        z_of_experts,
        *(rows.split(counts) for rows in (index_R, weights_R, dx_RD, dweights_R)),
        strict=True,
    ):
        x = torch.index_select(x_ND, 0, index, out=x_buffer[: len(index)])
        if z is None:
            z = x.new_empty(len(x), len(w1))
            _product(x, w1.t().to(dtype), out=z)
        dy = _padded(torch.index_select(dy_ND, 0, index, out=dy_buffer[: len(index)]))
        da = (dy @ w2.to(dtype))[: len(index)]
        a, dz, gate_gradient = activate_backward(z, da, weights, activation)
        dweights.copy_(gate_gradient)
        _outer(dy, _padded(a), out=dw2)
        dz = _padded(dz)
        _outer(dz, _padded(x), out=dw1)
        _product(dz, w1.to(dtype), out=dx)
    return dx_RD, dweights_R, dw_up, dw_down_EDF


def _padded(rows: Tensor) -> Tensor:
    """Return rows of a narrow dtype with zeros up to the next multiple of `_NARROW_ROWS`."""
    missing = -len(rows) % _NARROW_ROWS if rows.dtype.itemsize < 4 else 0
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _product(rows: Tensor, w: Tensor, *, out: Tensor) -> None:
    """Write the rows times w; what padding makes is left out."""
    rows = _padded(rows)
    if len(rows) == len(out):
        torch.mm(rows, w, out=out)
    else:
        out.copy_((rows @ w)[: len(out)])


def _outer(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Write a^T b, computed in the dtype of the rows, in that of the weights."""
    if out.dtype == a.dtype:
        torch.mm(a.t(), b, out=out)
    else:
        out.copy_(a.t() @ b)
