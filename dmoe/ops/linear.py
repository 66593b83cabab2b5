"""A linear map whose weights may be wider than its input: float32 masters, bfloat16 products."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from dmoe.ops import matmul


class Linear(nn.Linear):
    """`nn.Linear` in the dtype of its input; gradients have the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in `x`'s dtype."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias, (..., out), in the dtype of `x`, (..., in)."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if matmul.by_onednn(x.device, x.dtype):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(Function):
    """`F.linear` by the products of `matmul`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul.linear_forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = matmul.mm(dy_rows, weight).view_as(x) if needs_dx else None
        dw = matmul.outer(dy_rows, x_rows) if needs_dw else None
        return dx, dw, dy_rows.sum(0) if needs_db else None
