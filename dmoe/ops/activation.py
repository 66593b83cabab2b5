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
    z_RH: Tensor, da_RF: Tensor, factors: Tensor, activation: Activation, *, out_RH: Tensor
) -> Tensor:
    """Take the gradient of factors act(z): write that of z to `out_RH`, and return act(z).

    Args:
        z_RH: (R, 2F or F) pre-activations.
        da_RF: gradient of the product.
        factors: (R, F) or (R, 1).
        activation: as in the forward pass.
        out_RH: as `z_RH`.
    """
    # Factors may be wider, and what they multiply stays as it is.
    dact_RF = torch.mul(da_RF, factors, out=torch.empty_like(da_RF))
    if activation == "swiglu":
        gate_RF, up_RF = z_RH.chunk(2, dim=-1)
        dgate_RF, dup_RF = out_RH.chunk(2, dim=-1)
        silu_RF = F.silu(gate_RF)
        torch.mul(dact_RF, silu_RF, out=dup_RF)
        dact_RF.mul_(up_RF)
        torch.ops.aten.silu_backward.grad_input(dact_RF, gate_RF, grad_input=dgate_RF)
        return silu_RF.mul_(up_RF)
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(
            dact_RF, z_RH, approximate="tanh", grad_input=out_RH
        )
    else:
        torch.mul(dact_RF, z_RH > 0, out=out_RH)
    return activate(z_RH, activation)


def activate_weighted(z_RH: Tensor, weights_R: Tensor, activation: Activation) -> Tensor:
    """Return (R, F): the activation of pre-activations, times the gate weight of each row."""
    if z_RH.device.type != "cpu":
        return activate(z_RH, activation).mul_(weights_R[:, None])
    a_RF = z_RH.new_empty(len(z_RH), z_RH.shape[1] // (2 if activation == "swiglu" else 1))
    for z, weights, a in _pieces(z_RH, weights_R, a_RF):
        _weigh(activate(_not_narrow(z), activation), weights, out=a)
    return a_RF


def activate_weighted_backward(
    z_RH: Tensor, da_RF: Tensor, weights_R: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the weighted activation and take its gradient.

    Args:
        z_RH: (R, 2F or F) saved pre-activation.
        da_RF: gradient of the weighted activation; overwritten.
        weights_R: gate weights.
        activation: as in the forward pass.

    Returns:
        The weighted activation a_RF, which is where `da_RF` was, the gradient dz_RH, and the gate
        gradient dweights_R.
    """
    dz_RH, dweights_R = torch.empty_like(z_RH), torch.empty_like(weights_R)
    for z, da_or_a, weights, dz, dweights in _pieces(z_RH, da_RF, weights_R, dz_RH, dweights_R):
        da = _not_narrow(da_or_a)
        act = activate_backward(_not_narrow(z), da, weights[:, None], activation, out_RH=dz)
        torch.sum(act * da, -1, dtype=weights.dtype, out=dweights)
        _weigh(act, weights, out=da_or_a)
    return da_RF, dz_RH, dweights_R


def _weigh(act_RF: Tensor, weights_R: Tensor, *, out: Tensor) -> None:
    """Write activations times weights to `out`; where that is narrower they are overwritten."""
    if out.dtype == act_RF.dtype:
        torch.mul(act_RF, weights_R[:, None], out=out)
    else:  # an operation that rounds what it writes takes longer than one in place and a copy
        out.copy_(act_RF.mul_(weights_R[:, None]))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut the rows of all, on a CPU into pieces whose intermediate results stay in its cache."""
    first = tensors[0]
    rows = _PIECE // first.shape[1] if first.device.type == "cpu" else len(first)
    return zip(*(t.split(max(1, rows)) for t in tensors), strict=True)


def _not_narrow(x: Tensor) -> Tensor:
    """Return narrow numbers in float32 on a CPU, where each operation would convert them anew."""
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x
