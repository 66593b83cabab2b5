"""Experts of one neuron each: y = sum of w act(u . x) v over the experts that a token looks up.

Forward and backward are sums of looked-up rows, by token or by expert (`embedding_bag`), and dot
products of looked-up rows; no (slots, D) tensor is written. Shapes: N tokens, K slots a token, R
used slots, E experts, D model dim.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops.activation import activate_weighted, activate_weighted_backward
from dmoe.ops.rows import offsets_of

NeuronActivation = Literal["gelu", "relu"]

# Rows whose products are held at a time.
_CHUNK = 1 << 15


def neuron_bag(
    x_ND: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    in_ED: Tensor,
    out_ED: Tensor,
    activation: NeuronActivation,
) -> Tensor:
    """Return y_ND, for each token the sum over its slots of weight * act(in[id] . x) * out[id].

    Args:
        x_ND: (N, D) tokens.
        ids_NK: (N, K) int64 expert of each slot, -1 where unused; an expert may be there twice.
        weights_NK: (N, K) weights, in the dtype of the experts.
        in_ED: (E, D) input weights u.
        out_ED: (E, D) output weights v.
        activation: "gelu" (tanh form) or "relu".

    Returns:
        (N, D) in `x_ND`'s dtype; the products are in that of the experts.
    """
    y_ND: Tensor = _NeuronBag.apply(
        x_ND.to(in_ED.dtype), ids_NK, weights_NK, in_ED, out_ED, activation
    )
    return y_ND.to(x_ND.dtype)


def neuron_bag_loop(
    x_ND: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    in_ED: Tensor,
    out_ED: Tensor,
    activation: NeuronActivation,
) -> Tensor:
    """Define `neuron_bag`, one slot at a time, autograd for the gradients."""
    rows = []
    for x, ids, weights in zip(x_ND, ids_NK.tolist(), weights_NK, strict=True):
        y = 0 * x
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                z = in_ED[expert] @ x
                hidden = F.gelu(z, approximate="tanh") if activation == "gelu" else F.relu(z)
                y = y + weight * hidden * out_ED[expert]
        rows.append(y)
    return torch.stack(rows)


class _NeuronBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        in_ED: Tensor,
        out_ED: Tensor,
        activation: NeuronActivation,
    ) -> Tensor:
        used_NK = ids_NK >= 0
        token_R, ids_R = used_NK.nonzero()[:, 0], ids_NK[used_NK]
        offsets_N1 = offsets_of(used_NK.sum(1))
        weights_R = weights_NK[used_NK]
        z_R1 = _dots(x_ND, token_R, in_ED, ids_R)[:, None]
        a_R = activate_weighted(z_R1, weights_R, activation)[:, 0]
        ctx.save_for_backward(
            x_ND, weights_R, in_ED, out_ED, z_R1, used_NK, token_R, ids_R, offsets_N1
        )
        ctx.activation = activation
        return _sums(out_ED, ids_R, a_R, offsets_N1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_R, in_ED, out_ED, z_R1, used_NK, token_R, ids_R, offsets_N1 = (
            ctx.saved_tensors
        )
        dy_ND = dy_ND.contiguous()
        da_R1 = _dots(dy_ND, token_R, out_ED, ids_R)[:, None]
        a_R1, dz_R1, dweights_R = activate_weighted_backward(z_R1, da_R1, weights_R, ctx.activation)
        dx_ND = _sums(in_ED, ids_R, dz_R1[:, 0], offsets_N1)
        # The same by expert: sums in a fixed order, and no atomics.
        order_R = ids_R.argsort(stable=True)
        offsets_E1 = offsets_of(torch.bincount(ids_R, minlength=len(in_ED)))
        token_R = token_R[order_R]
        din_ED = _sums(x_ND, token_R, dz_R1[order_R, 0], offsets_E1)
        dout_ED = _sums(dy_ND, token_R, a_R1[order_R, 0], offsets_E1)
        dweights_NK = torch.zeros_like(used_NK, dtype=weights_R.dtype)
        dweights_NK[used_NK] = dweights_R
        return dx_ND, None, dweights_NK, din_ED, dout_ED, None


def _dots(a: Tensor, index_a_R: Tensor, b: Tensor, index_b_R: Tensor) -> Tensor:
    """Return (R,) the dot products of looked-up rows."""
    dots_R = a.new_empty(len(index_a_R))
    for start in range(0, len(dots_R), _CHUNK):
        part = slice(start, start + _CHUNK)
        torch.sum(a[index_a_R[part]] * b[index_b_R[part]], dim=1, out=dots_R[part])
    return dots_R


def _sums(table: Tensor, index_R: Tensor, weights_R: Tensor, offsets: Tensor) -> Tensor:
    """Return the weighted sum of the looked-up rows of each bag."""
    return F.embedding_bag(
        index_R,
        table,
        offsets,
        mode="sum",
        per_sample_weights=weights_R.contiguous(),
        include_last_offset=True,
    )
