"""Batch norm of PEER's queries (He, arXiv 2407.04153), which spreads them over the keys.

In training each number of a query is brought to mean 0 and variance 1 over the tokens of a
micro-batch, padding left out; at inference by running moments of the steps before. A micro-batch
is the same set of tokens on any layout, and moments move at the end of a step, not in a forward
pass: neither ranks nor recomputation change a number. Shapes: T tokens, F numbers of a query.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dmoe.moe.routing import MoEContext

_DECAY = 0.9
"""Of the running moments, a step."""
_EPS = 1e-5


class QueryBatchNorm(nn.Module):
    """Batch norm with a scale and a shift of each number, as in `torch.nn.BatchNorm1d`."""

    def __init__(self, num_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        # Zero at the start, as buffers are; divided by the sum of their weights, as in Adam.
        self.mean_F: Tensor
        self.square_F: Tensor
        self.weight_sum: Tensor
        self.register_buffer("mean_F", torch.zeros(num_features))
        self.register_buffer("square_F", torch.zeros(num_features))
        self.register_buffer("weight_sum", torch.zeros(()))

    def forward(self, query_TF: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, F) queries, normalised; before the first step always by their batch."""
        if context.training or not self.weight_sum:
            valid_T1 = _valid(query_TF, context)
            num = valid_T1.sum().clamp(min=1)
            mean_F = (query_TF * valid_T1).sum(0) / num
            variance_F = ((query_TF - mean_F).square() * valid_T1).sum(0) / num
        else:
            mean_F = (self.mean_F / self.weight_sum).to(query_TF)
            square_F = (self.square_F / self.weight_sum).to(query_TF)
            variance_F = (square_F - mean_F.square()).clamp(min=0)
        scale_F = self.weight.to(query_TF) * (variance_F + _EPS).rsqrt()
        return (query_TF - mean_F) * scale_F + self.bias.to(query_TF)

    def end_step(self, means: Mapping[str, Tensor]) -> None:
        """Move the running moments towards those of a step, which `moments` summed up."""
        for buffer_F, name in ((self.mean_F, "query"), (self.square_F, "query_square")):
            buffer_F.mul_(_DECAY).add_((1 - _DECAY) * means[name].to(buffer_F))
        self.weight_sum.mul_(_DECAY).add_(1 - _DECAY)


@torch.no_grad()
def moments(query_TF: Tensor, context: MoEContext) -> dict[str, Tensor]:
    """Return the (F,) sums over tokens of each number of the queries and of its square."""
    kept_TF = query_TF * _valid(query_TF, context)
    return {"query": kept_TF.sum(0), "query_square": kept_TF.square().sum(0)}


def _valid(query_TF: Tensor, context: MoEContext) -> Tensor:
    if context.valid_T is None:
        return torch.ones_like(query_TF[:, :1])
    return context.valid_T[:, None].to(query_TF)
