"""The router's linear map in float32, whatever the model's precision (Switch, selective precision).

Shapes: T tokens, D model dim, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops import matmul


def router_gate(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Return logits x w^T in float32, or in float64 if `w_ED` is; keeps no wide copy of `x_TD`."""
    return _RouterGate.apply(x_TD, w_ED)


def router_gate_loop(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Define `router_gate` by autograd."""
    wide = torch.promote_types(w_ED.dtype, torch.float32)
    return F.linear(x_TD.to(wide), w_ED.to(wide))


class _RouterGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_ED)
        wide = torch.promote_types(w_ED.dtype, torch.float32)
        return matmul.linear_forward(x_TD.to(wide), w_ED.to(wide))

    @staticmethod
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, w_ED = ctx.saved_tensors
        dx_TD = matmul.mm(dlogits_TE, w_ED.to(dlogits_TE.dtype))
        dw_ED = matmul.outer(dlogits_TE, x_TD.to(dlogits_TE.dtype))
        return dx_TD.to(x_TD.dtype), dw_ED.to(w_ED.dtype)
