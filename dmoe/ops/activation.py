"""The activation of an expert and its gradient, with the gate that multiplies it.

Shapes: R routed rows, F expert dim, H = 2F if gated, else F.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["swiglu", "gelu", "relu"]


def activate(z_RH: Tensor, activation: Activation) -> Tensor:
    """Return a_RF, the activation of (R, 2F or F) pre-activations."""
    if activation == "swiglu":
        gate_RF, up_RF = z_RH.chunk(2, dim=-1)
        return F.silu(gate_RF).mul_(up_RF)
    if activation == "gelu":
        return F.gelu(z_RH, approximate="tanh")
    return F.relu(z_RH)


def activate_backward(
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
        a_RF = activate(z_RH, activation)
        dweights_R = torch.mul(da_RF, a_RF).sum(-1, dtype=weights_R.dtype)
        da_RF.mul_(weights_R1)
        if activation == "gelu":
            dz_RH = torch.ops.aten.gelu_backward(da_RF, z_RH, approximate="tanh")
        else:
            dz_RH = da_RF * (z_RH > 0)
    return a_RF.mul_(weights_R1), dz_RH, dweights_R
