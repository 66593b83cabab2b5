"""Noisy top-k gating: the k largest of logits with learned noise.

Paper: sparsely-gated MoE, Shazeer et al. 2017, arXiv 1701.06538.
Equations: H(x) = x W_g + eps softplus(x W_noise), and a softmax over its k largest (eq. 3-5). Two
    losses of its own even out the experts' importance and load (eq. 6-11).
Config: `model.moe.router: {name: noisy_top_k, top_k: 4}`.
Differs: nothing; at inference there is no noise.
Shapes: T tokens, D model dim, E experts, K slots per token.
"""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from dmoe.moe.losses.groups import in_groups
from dmoe.moe.losses.variation import gates_of_experts
from dmoe.moe.routers.base import Router
from dmoe.moe.routers.choice import choose, softmax_over_choice
from dmoe.moe.routers.noise import (
    NoisyGate,
    NoisySection,
    chance_of_choice,
    is_chosen,
    with_noise,
)
from dmoe.moe.routing import MoEContext, Routing, make_routing


class NoisyTopKConfig(NoisySection):
    """Each token goes to the experts of its `top_k` largest noisy logits."""

    name: Literal["noisy_top_k"]
    """Top-k of logits with learned noise."""
    top_k: PositiveInt = 2
    """Experts per token."""

    def build(self, *, dim: int, num_experts: int) -> "NoisyTopKRouter":
        """Build the router."""
        return NoisyTopKRouter(self, dim=dim, num_experts=num_experts)


class NoisyTopKRouter(Router):
    """Scores every expert for every token, adds noise in training, and chooses k."""

    def __init__(self, config: NoisyTopKConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = NoisyGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        clean_TE, std_TE = self.gate(x_TD)
        is_noisy = self.config.noise and context.training
        noisy_TE = with_noise(clean_TE, std_TE, context) if is_noisy else clean_TE
        scores_TE = clean_TE.softmax(-1)
        ids_TK = context.decide("expert_ids", lambda: self.select(noisy_TE, scores_TE, context))
        weights_TK = softmax_over_choice(ids_TK, noisy_TE)
        amounts_TE = {"importance": gates_of_experts(ids_TK, weights_TK, clean_TE.shape[1])}
        if is_noisy:
            chosen_TE = is_chosen(ids_TK, clean_TE.shape[1])
            amounts_TE["load"] = chance_of_choice(noisy_TE, clean_TE, std_TE, chosen_TE)
        size = self.config.group_size(len(x_TD), context)
        amounts_GE = {name: in_groups(a_TE, size).sum(1) for name, a_TE in amounts_TE.items()}
        losses = self.config.losses(amounts_GE, len(x_TD), context)
        return make_routing(clean_TE, scores_TE, ids_TK, weights_TK, losses=losses)

    def select(self, noisy_TE: Tensor, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the chosen experts; padding chooses none."""
        return choose(noisy_TE, scores_TE, context.k_or(self.config.top_k), context)
