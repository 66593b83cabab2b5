"""ReMoE: the gate of an expert is relu(logit), and an expert whose gate is 0 is not used.

Paper: Wang et al., arXiv 2412.14711.
Equations: g = relu(W x), differentiable throughout: no top-k. An L1 penalty on the gates makes them
    sparse; its weight is multiplied by a factor after a step with more experts a token than the
    target, and divided by it after one with fewer, and it may weigh each expert by its load.
Config: `model.moe.router: {name: relu, target_k: 2}`.
Differs: there one penalty serves all layers together, on the mean over layers; here each layer has
    its own, and their sum counts.
Shapes: T tokens, E experts, K slots per token.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import choose, scores_of
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.ops import count_slots


class ReluConfig(RouterSection):
    """Each token uses the experts with a logit above 0; a penalty keeps them few."""

    takes_gate_threshold: ClassVar[bool] = True
    balances_itself: ClassVar[bool] = True

    name: Literal["relu"]
    """The gate is relu(logit)."""
    target_k: float = Field(default=2.0, gt=0)
    """Mean experts per token that the penalty steers to, in each layer. A model starts with about
    half of all experts."""
    penalty: PositiveFloat = 1e-8
    """Weight of the penalty at the first step."""
    penalty_factor: float = Field(default=1.2, gt=1)
    """The weight is multiplied by it after a step in which tokens had more experts than the target,
    and divided by it after one in which they had fewer. Where the weight grows faster than the
    router learns, it overshoots the target, and experts that no token uses any more do not come
    back: take less in short runs."""
    balance: bool = True
    """Penalise the gates of an expert in proportion to its load in the micro-batch, so that loads
    become even."""

    def limits(self) -> dict[str, float | None]:
        """Return what must not be above the number of experts, by the keys of `model.moe`."""
        return {"router.target_k": self.target_k}

    def nominal_k(self, num_experts: int) -> float:
        """Return the target."""
        return self.target_k

    def most_k(self, num_experts: int) -> int:
        """Return the most experts that a token may have where the context does not say."""
        return num_experts

    def loss_weights(self) -> dict[str, float]:
        """Return 1: the penalty carries its own weight, which changes."""
        return {"relu_penalty": 1.0}

    def build(self, *, dim: int, num_experts: int) -> "ReluRouter":
        """Build the router."""
        return ReluRouter(self, dim=dim, num_experts=num_experts)


class ReluRouter(Router):
    """Uses every expert whose logit is above 0."""

    def __init__(self, config: ReluConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)
        # The penalty is penalty x penalty_factor^exponent; zero at the start, as buffers are.
        self.exponent: Tensor
        self.register_buffer("exponent", torch.zeros(()))

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(x_TD)
        gates_TE = logits_TE.relu()
        ids_TK = context.decide("expert_ids", lambda: self.select(gates_TE, context))
        losses = {}
        if context.totals is not None:
            losses["relu_penalty"] = self.weight() * self.penalty(gates_TE, ids_TK, context)
        weights_TK = scores_of(ids_TK, gates_TE)
        return make_routing(logits_TE, logits_TE.softmax(-1), ids_TK, weights_TK, losses=losses)

    def select(self, gates_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the experts used, largest gate first; padding uses none."""
        k_T = (gates_TE > 0).sum(1)
        if context.k is not None:
            k_T = k_T.minimum(torch.as_tensor(context.k, device=k_T.device))
        return choose(gates_TE, gates_TE, k_T, context)

    def weight(self) -> Tensor:
        """Return the weight of the penalty, lambda_i."""
        return self.config.penalty * self.config.penalty_factor**self.exponent

    def penalty(self, gates_TE: Tensor, ids_TK: Tensor, context: MoEContext) -> Tensor:
        """Return this micro-batch's share of the mean over tokens of sum_e f_e gate_e.

        f_e is the load of expert e over an even load of `target_k` experts per token; 1 without
        `balance`.
        """
        assert context.totals is not None
        num_tokens, num_experts = gates_TE.shape
        if context.valid_T is not None:
            gates_TE = gates_TE * context.valid_T[:, None]
            num_tokens = int(context.valid_T.sum())
        if self.config.balance:
            even = max(num_tokens, 1) * self.config.target_k / num_experts
            gates_TE = gates_TE * (count_slots(ids_TK, num_experts) / even)
        return gates_TE.sum() / context.totals.num_tokens

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Raise the penalty after a step with too many experts per token, or lower it."""
        mean_k = counts_E.sum() / num_tokens
        self.exponent += torch.sign(mean_k - self.config.target_k)
