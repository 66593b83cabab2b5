"""A linear map whose weights may be wider than its input: float32 masters, bfloat16 products."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` in the dtype of its input; gradients have the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in `x`'s dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)
