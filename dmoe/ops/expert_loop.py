"""The expert network an expert after the other: what a CPU does best with few experts.

What an expert makes on the way stays in the cache for its next product, and the source rows are
gathered into the same small buffer for all. Called by `expert_ffn` alone, whose arguments these
are. Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else
F.
"""

import torch
from torch import Tensor

from dmoe.ops.activation import Activation, activate, activate_backward


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
        torch.mm(x, w1.t().to(dtype), out=z)
        torch.mm(activate(z, activation).mul_(weights), w2.t().to(dtype), out=y)
    return z_RH, y_RD


def backward_by_expert(
    dy_ND: Tensor,
    x_ND: Tensor,
    index_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    z_RH: Tensor,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of each row's input and gate, dx_RD and dweights_R, and of both weights.

    Args:
        dy_ND: gradient of the output, contiguous.
        z_RH: what the forward pass returned.
    """
    counts, dtype = counts_E.tolist(), x_ND.dtype
    dx_RD, dweights_R = x_ND.new_empty(len(index_R), x_ND.shape[1]), torch.empty_like(weights_R)
    dw_up, dw_down_EDF = torch.empty_like(w_up), torch.empty_like(w_down_EDF)
    x_buffer = x_ND.new_empty(max(counts), x_ND.shape[1])
    dy_buffer = torch.empty_like(x_buffer)
    for w1, w2, dw1, dw2, index, weights, z, dx, dweights in zip(
        w_up,
        w_down_EDF,
        dw_up,
        dw_down_EDF,
        *(rows.split(counts) for rows in (index_R, weights_R, z_RH, dx_RD, dweights_R)),
        strict=True,
    ):
        dy = torch.index_select(dy_ND, 0, index, out=dy_buffer[: len(index)])
        a, dz, gate_gradient = activate_backward(z, dy @ w2.to(dtype), weights, activation)
        dweights.copy_(gate_gradient)
        _outer(dy, a, out=dw2)
        x = torch.index_select(x_ND, 0, index, out=x_buffer[: len(index)])
        _outer(dz, x, out=dw1)
        torch.mm(dz, w1.to(dtype), out=dx)
    return dx_RD, dweights_R, dw_up, dw_down_EDF


def _outer(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Write a^T b, computed in the dtype of the rows, in that of the weights."""
    if out.dtype == a.dtype:
        torch.mm(a.t(), b, out=out)
    else:
        out.copy_(a.t() @ b)
