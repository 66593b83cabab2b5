"""What every router is, and the linear map that most of them score with.

Shapes: T tokens, D model dim, E experts.
"""

import torch
from torch import Tensor, nn

from dmoe.moe.routing import MoEContext, Routing
from dmoe.ops import router_gate


class Router(nn.Module):
    """Decides which experts each token goes to, and with what weights."""

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        raise NotImplementedError

    def end_step(self, counts_E: Tensor) -> None:
        """Adapt to the slots that each expert got in a training step, over the global batch."""


class RouterGate(nn.Module):
    """The linear map from a token to its logits, computed in float32 at least."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        # For a layer that is used alone; a model draws its weights from its own seed.
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return (T, E) logits."""
        return router_gate(x_TD, self.weight)
