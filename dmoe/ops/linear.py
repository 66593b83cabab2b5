"""A linear map whose weights may be wider than its input: float32 masters, bfloat16 products."""

import math
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
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_dw else None, weight if needs_dx else None)
        return matmul.linear_forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy_rows = _rows(dy)
        dx = (
            None
            if weight is None
            else matmul.mm(dy_rows, weight).view(*dy.shape[:-1], weight.shape[1])
        )
        dw = None if x is None else matmul.outer(dy_rows, _rows(x))
        return dx, dw, dy_rows.sum(0) if ctx.needs_input_grad[2] else None


def _rows(x: Tensor) -> Tensor:
    """Return (..., N) as a matrix of N columns."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
