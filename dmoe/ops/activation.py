"""The activation of an expert and its gradient, with the gate that multiplies it.

Shapes: R routed rows, F expert dim, H = 2F if gated, else F.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["swiglu", "gelu", "relu"]
_PIECE = 2**18
"""Pre-activations that a CPU takes at a time."""


def activate(z_RH: Tensor, activation: Activation) -> Tensor:
    """Return a_RF, the activation of (R, 2F or F) pre-activations."""
    if activation == "swiglu":
        gate_RF, up_RF = z_RH.chunk(2, dim=-1)
        return F.silu(gate_RF).mul_(up_RF)
    if activation == "gelu":
        return F.gelu(z_RH, approximate="tanh")
    return F.relu(z_RH)


def activate_backward(
    z: Tensor, factors: Tensor, da: Tensor, activation: Activation, *, out: Tensor
) -> Tensor:
    """Take the gradient of factors act(z): write that of z to `out`, and return act(z).

    Args:
        z: (R, 2F or F) pre-activations.
        factors: (R, F) or (R, 1).
        da: (R, F) gradient of the product.
        activation: as in the forward pass.
        out: (R, 2F or F).
    """
    dact = torch.mul(da, factors, out=torch.empty_like(da))
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        dgate_out, dup_out = out.chunk(2, dim=-1)
        silu = F.silu(gate)
        torch.mul(dact, silu, out=dup_out)
        torch.ops.aten.silu_backward.grad_input(dact.mul_(up), gate, grad_input=dgate_out)
        return silu.mul_(up)
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(dact, z, approximate="tanh", grad_input=out)
    else:
        torch.mul(dact, z > 0, out=out)
    return activate(z, activation)


def activate_weighted(z_RH: Tensor, weights_R: Tensor, activation: Activation) -> Tensor:
    """Return (R, F): the activation of pre-activations, times the gate weight of each row."""
    a_RF = z_RH.new_empty(len(z_RH), _width(z_RH, activation))
    for z, weights, a in _pieces(z_RH, weights_R, a_RF):
        torch.mul(activate(_wide(z), activation), weights[:, None], out=a)
    return a_RF


def activate_weighted_backward(
    z_RH: Tensor, da_RF: Tensor, weights_R: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the weighted activation and take its gradient.

    Args:
        z_RH: (R, 2F or F) saved pre-activation.
        da_RF: gradient of the weighted activation.
        weights_R: gate weights.
        activation: as in the forward pass.

    Returns:
        The weighted activation a_RF, the gradient dz_RH, and the gate gradient dweights_R.
    """
    a_RF, dz_RH, dweights_R = (torch.empty_like(t) for t in (da_RF, z_RH, weights_R))
    for z, da, weights, a, dz, dweights in _pieces(z_RH, da_RF, weights_R, a_RF, dz_RH, dweights_R):
        da, weights_R1 = _wide(da), weights[:, None]
        act = activate_backward(_wide(z), weights_R1, da, activation, out=dz)
        torch.sum(act * da, -1, dtype=weights.dtype, out=dweights)
        torch.mul(act, weights_R1, out=a)
    return a_RF, dz_RH, dweights_R


def _width(z_RH: Tensor, activation: Activation) -> int:
    return z_RH.shape[1] // 2 if activation == "swiglu" else z_RH.shape[1]


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut the rows of all, on a CPU into pieces whose intermediate results stay in its cache."""
    first = tensors[0]
    rows = _PIECE // first.shape[1] if first.device.type == "cpu" else len(first)
    return zip(*(t.split(max(1, rows)) for t in tensors), strict=True)


def _wide(x: Tensor) -> Tensor:
    """Return narrow numbers in float32 on a CPU, where each operation would convert them anew."""
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x
