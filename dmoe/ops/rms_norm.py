"""RMSNorm, x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), with a hand-written backward.

On a GPU torch's own kernel is one pass. On a CPU it is a chain of ten operations that keeps several
copies of x; here it keeps x and one number a row, and goes back by LayerNorm's kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim of (..., D) in float32 at least; the result has `x`'s dtype."""
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Define `rms_norm`."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight.to(x.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        # One pass of LayerNorm's kernel with a mean of zero. It takes scale * mean(dy * weight)
        # from every row of dx, as if the mean had been subtracted, so that is added back.
        wide = weight.to(x.dtype).to(scale.dtype)  # as the forward pass has rounded it
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, torch.zeros_like(scale), scale, wide, None, [True, True, False]
        )
        mean = (dy.to(scale.dtype) @ wide).unsqueeze_(-1).div_(x.shape[-1])
        return dx.add_(mean.mul_(scale)), dweight.to(weight.dtype), None
