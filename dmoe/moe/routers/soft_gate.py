"""Soft gate: every token goes to every expert, weighed by a softmax over all of them.

Paper: adaptive mixtures of local experts, Jacobs, Jordan, Nowlan and Hinton, 1991.
Equations: y = sum_e p_e E_e(x), p = softmax(W x).
Config: `model.moe.router: {name: soft_gate}`.
Differs: as a layer of a language model it is trained by the model's loss. The losses of 1991, which
    compare each expert's output with the target, are in `dmoe.moe.adaptive`.
Shapes: T tokens, D model dim, E experts.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routing import MoEContext, Routing, make_routing


class SoftGateConfig(RouterSection):
    """Each token goes to all experts."""

    takes_k: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True

    name: Literal["soft_gate"]
    """A softmax over all experts, of which none is left out."""

    def limits(self) -> dict[str, float | None]:
        """Return nothing: there is no number to check."""
        return {}

    def nominal_k(self, num_experts: int) -> float:
        """Return all experts."""
        return num_experts

    def most_k(self, num_experts: int) -> int:
        """Return all experts."""
        return num_experts

    def build(self, *, dim: int, num_experts: int) -> "SoftGateRouter":
        """Build the router."""
        return SoftGateRouter(dim=dim, num_experts=num_experts)


class SoftGateRouter(Router):
    """Weighs every expert for every token."""

    def __init__(self, *, dim: int, num_experts: int):
        super().__init__()
        self.gate = RouterGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D), to all experts."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        ids_TE = context.decide("expert_ids", lambda: self.select(scores_TE, context))
        return make_routing(logits_TE, scores_TE, ids_TE, scores_TE)

    def select(self, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, E) ids of all experts; padding has none."""
        ids_TE = torch.arange(scores_TE.shape[1], device=scores_TE.device).expand(scores_TE.shape)
        if context.valid_T is None:
            return ids_TE
        return ids_TE.masked_fill(~context.valid_T[:, None], -1)
