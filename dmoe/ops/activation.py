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


def activate_weighted(z_RH: Tensor, weights_R: Tensor, activation: Activation) -> Tensor:
    """Return (R, F): the activation of pre-activations, times the gate weight of each row."""
    a_RF = z_RH.new_empty(len(z_RH), _width(z_RH, activation))
    for z, weights, a in _pieces(z_RH, weights_R, a_RF):
        torch.mul(activate(_wide(z), activation), weights[:, None], out=a)
    return a_RF


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
    a_RF, dz_RH, dweights_R = (torch.empty_like(t) for t in (da_RF, z_RH, weights_R))
    for z, da, weights, *out in _pieces(z_RH, da_RF, weights_R, a_RF, dz_RH, dweights_R):
        _backward_of_piece(_wide(z), _wide(da), weights[:, None], activation, *out)
    return a_RF, dz_RH, dweights_R


def _backward_of_piece(
    z: Tensor,
    da: Tensor,
    weights: Tensor,
    activation: Activation,
    a_out: Tensor,
    dz_out: Tensor,
    dweights_out: Tensor,
) -> None:
    """Write the results of `activate_backward`; overwrites `da`."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        silu = F.silu(gate)
        a = silu * up
    else:
        a = activate(z, activation)
    torch.sum(a * da, -1, dtype=weights.dtype, out=dweights_out)
    torch.mul(a, weights, out=a_out)
    da.mul_(weights)
    if activation == "swiglu":
        dgate_out, dup_out = dz_out.chunk(2, dim=-1)
        torch.mul(da, silu, out=dup_out)
        torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate_out)
    elif activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(da, z, approximate="tanh", grad_input=dz_out)
    else:
        torch.mul(da, z > 0, out=dz_out)


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
