"""Forced balance: every expert has the same load, whatever the tokens are, for benchmarks.

Paper: none; not a way to train a model that is to be used.
Equations: token t takes the experts t K, t K + 1, ... modulo E, or goes on where the token before
    it ended if each has a number of its own. The gates are a softmax over the choice, so that the
    work is that of a real router.
Config: `model.moe.router: {name: forced_balance}`.
Differs: from every other router.
Shapes: T tokens, E experts, K slots per token.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import most_slots, softmax_over_choice
from dmoe.moe.routing import MoEContext, Routing, make_routing


class ForcedBalanceConfig(RouterSection):
    """Perfect balance by construction, for measuring speed."""

    name: Literal["forced_balance"]
    """Equal load whatever the tokens are."""
    top_k: PositiveInt = 2
    """Experts per token."""

    def build(self, *, dim: int, num_experts: int) -> "ForcedBalanceRouter":
        """Build the router."""
        return ForcedBalanceRouter(self, dim=dim, num_experts=num_experts)


class ForcedBalanceRouter(Router):
    """Deals the tokens out to the experts in turn."""

    def __init__(self, config: ForcedBalanceConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D), by its place alone."""
        logits_TE = self.gate(x_TD)
        ids_TK = context.decide("expert_ids", lambda: self.select(logits_TE, context))
        weights_TK = softmax_over_choice(ids_TK, logits_TE)
        return make_routing(logits_TE, logits_TE.softmax(-1), ids_TK, weights_TK)

    def select(self, logits_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the next experts for each token; padding has none."""
        num_tokens, num_experts = logits_TE.shape
        k = context.k_or(self.config.top_k)
        k_T = torch.as_tensor(k, device=logits_TE.device).expand(num_tokens)
        place_K = torch.arange(most_slots(k), device=logits_TE.device)
        ids_TK = (k_T.cumsum(0) - k_T)[:, None] + place_K
        ids_TK = (ids_TK % num_experts).masked_fill(place_K >= k_T[:, None], -1)
        if context.valid_T is None:
            return ids_TK
        return ids_TK.masked_fill(~context.valid_T[:, None], -1)
