"""The feed-forward network of all experts at once, over rows sorted by expert.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else F.
The gate weight of a row multiplies the hidden activation, not the output: the product is the same,
and the gradient of the gate, <dy W_down, a>, then needs no output row to be saved.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.grouped_mm import Backend, grouped_mm, grouped_outer, is_loop
from dmoe.ops.rows import RowMap, gather_loop, gather_sum_loop, sum_rows

Activation = Literal["swiglu", "gelu", "relu"]


def expert_ffn(
    x_ND: Tensor,
    rows: RowMap,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    *,
    activation: Activation,
    backend: Backend = "auto",
) -> Tensor:
    """Return y_ND: for each source the sum over its rows of weights_R * W_down act(W_up x).

    Rows are read and summed through `rows`, forward and backward: only `x_ND` and the
    pre-activation (R, 2F or F) are saved, so a layer of K slots keeps 2ND + 4NKF bytes in bfloat16
    (gated), and neither x_RD nor the gradient dy_RD need be written.

    Args:
        x_ND: (N, D) source rows.
        rows: the map from routed rows to sources; rows are sorted by expert.
        weights_R: (R,) gate weights, float32 or wider.
        counts_E: (E,) int64 rows of each expert.
        w_up: (E, 2F, D) gate rows, then up rows, for "swiglu"; else (E, F, D). Products are in
            `x_ND`'s dtype; weights, and so their gradients, may be wider.
        w_down_EDF: (E, D, F), as `w_up`.
        activation: "swiglu", or "gelu" (tanh form, as in GPT-2) or "relu" without a gate.
        backend: which grouped GEMM.

    Returns:
        (N, D) in `x_ND`'s dtype; zero for a source without rows.
    """
    return _ExpertFFN.apply(x_ND, weights_R, w_up, w_down_EDF, rows, counts_E, activation, backend)


def expert_ffn_loop(
    x_ND: Tensor,
    rows: RowMap,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    *,
    activation: Activation,
) -> Tensor:
    """Define `expert_ffn`: the same arguments, an expert at a time, autograd for the gradients."""
    x_RD = gather_loop(x_ND, rows)
    outputs = []
    for expert, x in enumerate(x_RD.split(counts_E.tolist())):
        hidden = F.linear(x, w_up[expert])
        if activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        elif activation == "gelu":
            hidden = F.gelu(hidden, approximate="tanh")
        else:
            hidden = F.relu(hidden)
        outputs.append(F.linear(hidden, w_down_EDF[expert]))
    return gather_sum_loop((torch.cat(outputs) * weights_R[:, None]).to(x_ND.dtype), rows)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_R: Tensor,
        w_up: Tensor,
        w_down_EDF: Tensor,
        rows: RowMap,
        counts_E: Tensor,
        activation: Activation,
        backend: Backend,
    ) -> Tensor:
        z_RH = grouped_mm(
            x_ND, w_up.transpose(1, 2), counts_E, index_R=rows.index_R, backend=backend
        )
        a_RF = _activate(z_RH, activation).mul_(weights_R[:, None])
        y_RD = grouped_mm(a_RF, w_down_EDF.transpose(1, 2), counts_E, backend=backend)
        ctx.save_for_backward(x_ND, weights_R, w_up, w_down_EDF, z_RH, counts_E, *rows)
        ctx.activation, ctx.backend = activation, backend
        return sum_rows(y_RD, rows)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_R, w_up, w_down_EDF, z_RH, counts_E, *row_tensors = ctx.saved_tensors
        rows, backend = RowMap(*row_tensors), ctx.backend
        index_R = rows.index_R
        # The gradient of a sum is expanded: every row of it the same memory.
        dy, dy_index_R = dy_ND.contiguous(), index_R
        if not is_loop(dy, counts_E, backend):  # it would gather twice
            dy, dy_index_R = dy.index_select(0, index_R), None
        da_RF = grouped_mm(dy, w_down_EDF, counts_E, index_R=dy_index_R, backend=backend)
        a_RF, dz_RH, dweights_R = _activate_backward(z_RH, da_RF, weights_R, ctx.activation)
        dw_down_EDF = grouped_outer(
            dy, a_RF, counts_E, a_index_R=dy_index_R, dtype=w_down_EDF.dtype, backend=backend
        )
        del dy
        dw_up = grouped_outer(
            dz_RH, x_ND, counts_E, b_index_R=index_R, dtype=w_up.dtype, backend=backend
        )
        dx_ND = None
        if ctx.needs_input_grad[0]:
            dx_ND = sum_rows(grouped_mm(dz_RH, w_up, counts_E, backend=backend), rows)
        return dx_ND, dweights_R, dw_up, dw_down_EDF, None, None, None, None


def _activate(z_RH: Tensor, activation: Activation) -> Tensor:
    if activation == "swiglu":
        gate_RF, up_RF = z_RH.chunk(2, dim=-1)
        return F.silu(gate_RF).mul_(up_RF)
    if activation == "gelu":
        return F.gelu(z_RH, approximate="tanh")
    return F.relu(z_RH)


def _activate_backward(
    z_RH: Tensor, da_RF: Tensor, weights_R: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the weighted activation and take its gradient.

    Args:
        z_RH: (R, 2F or F) saved pre-activation.
        da_RF: gradient of the weighted activation; overwritten.
        weights_R: gate weights.
        activation: as in the forward pass.

    Returns:
        The weighted activation a_RF, the gradient dz_RH, and the gate gradient dweights_R.
    """
    weights_R1 = weights_R[:, None]
    if activation == "swiglu":
        gate_RF, up_RF = z_RH.chunk(2, dim=-1)
        silu_RF = F.silu(gate_RF)
        a_RF = silu_RF * up_RF
        dweights_R = torch.mul(da_RF, a_RF).sum(-1, dtype=weights_R.dtype)
        da_RF.mul_(weights_R1)
        dz_RH = torch.empty_like(z_RH)
        dgate_RF, dup_RF = dz_RH.chunk(2, dim=-1)
        torch.mul(da_RF, silu_RF, out=dup_RF)
        torch.ops.aten.silu_backward.grad_input(da_RF.mul_(up_RF), gate_RF, grad_input=dgate_RF)
    else:
        a_RF = _activate(z_RH, activation)
        dweights_R = torch.mul(da_RF, a_RF).sum(-1, dtype=weights_R.dtype)
        da_RF.mul_(weights_R1)
        if activation == "gelu":
            dz_RH = torch.ops.aten.gelu_backward(da_RF, z_RH, approximate="tanh")
        else:
            dz_RH = da_RF * (z_RH > 0)
    return a_RF.mul_(weights_R1), dz_RH, dweights_R
