"""Top-p routing: a token takes its best experts until their probabilities sum to p.

Paper: Dynamic-MoE, arXiv 2403.07652; the controller DTop-p, arXiv 2512.13996.
Equations: k is the smallest number with sum of the k largest softmax(W x) >= p; the gates are these
    probabilities, over their sum with `normalize`. Dynamic-MoE adds the mean entropy of the
    probabilities to the loss, which keeps experts few. DTop-p moves p after each step instead, by a
    controller of proportional and integral terms, so that a token has a wanted number on average.
Config: `model.moe.router: {name: top_p, p: 0.4, entropy_weight: 0.0001}`, or with `controller:
    {target_k: 2}`.
Differs: in DTop-p one p serves all layers, whose logits are normalised; here each layer has its
    own.
Shapes: T tokens, E experts, K slots per token.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import choose, divided_by_sum, scores_of
from dmoe.moe.routing import MoEContext, Routing, make_routing


class ControllerConfig(ConfigModel):
    """A PI controller: p follows how far the mean number of experts of a step is off its target.

    After each step, with the error e = 1 - mean k / target_k, the threshold p grows by proportional
    (e - the last e) + integral e, and stays from 1 / experts to 1.
    """

    target_k: float = Field(ge=1)
    """Mean number of experts per token, in each layer."""
    proportional: NonNegativeFloat = 0.05
    """Gain on the change of the error."""
    integral: NonNegativeFloat = 0.05
    """Gain on the error."""


class TopPConfig(RouterSection):
    """Each token takes its best experts up to a total probability, so sure tokens take fewer."""

    takes_gate_threshold: ClassVar[bool] = True

    name: Literal["top_p"]
    """Token-choice top-p routing."""
    p: float = Field(default=0.4, gt=0, le=1)
    """Total probability that a token's experts reach; with a controller where it starts from."""
    max_k: PositiveInt | None = None
    """Most experts per token; null for no limit but their number."""
    normalize: bool = True
    """Divide a token's gates by their sum. A token of one expert then has the gate 1, and teaches
    the router by the balance losses alone."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the entropy of a token's probabilities, in nats, as a loss: without it a router can
    earn more experts by making them all alike (Dynamic-MoE: 0.0001)."""
    controller: ControllerConfig | None = None
    """Moves p towards a mean number of experts; null to leave it where it is."""

    @model_validator(mode="after")
    def _target_can_be_reached(self) -> "TopPConfig":
        target = self.controller.target_k if self.controller else 1
        if self.max_k is not None and target > self.max_k:
            raise ConfigError(
                f"controller.target_k = {target:g} is more than max_k = {self.max_k}, so no p "
                f"reaches it: change either",
                key="controller.target_k",
            )
        return self

    def limits(self) -> dict[str, float | None]:
        """Return what must not be above the number of experts, by the keys of `model.moe`."""
        target = self.controller.target_k if self.controller else None
        return {"router.max_k": self.max_k, "router.controller.target_k": target}

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of the entropy, if it has one."""
        return {"entropy": self.entropy_weight} if self.entropy_weight else {}

    def nominal_k(self, num_experts: int) -> float:
        """Return the controller's target; without one the most, as p does not tell."""
        return self.controller.target_k if self.controller else self.most_k(num_experts)

    def most_k(self, num_experts: int) -> int:
        """Return the most experts that a token may have where the context does not say."""
        return self.max_k or num_experts

    def build(self, *, dim: int, num_experts: int) -> "TopPRouter":
        """Build the router."""
        return TopPRouter(self, dim=dim, num_experts=num_experts)


class TopPRouter(Router):
    """Scores every expert for every token and chooses as many as reach p."""

    def __init__(self, config: TopPConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.gate = RouterGate(dim, num_experts)
        # The state of the controller; zero where it starts, as a model's buffers are.
        self.p_shift: Tensor
        self.last_error: Tensor
        self.register_buffer("p_shift", torch.zeros(()))
        self.register_buffer("last_error", torch.zeros(()))

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        ids_TK = context.decide("expert_ids", lambda: self.select(scores_TE, context))
        weights_TK = scores_of(ids_TK, scores_TE)
        if self.config.normalize:
            weights_TK = divided_by_sum(weights_TK)
        losses = {}
        if context.totals is not None and self.config.entropy_weight:
            entropy_T = -(scores_TE * logits_TE.log_softmax(-1)).sum(1)
            if context.valid_T is not None:
                entropy_T = entropy_T * context.valid_T
            losses["entropy"] = entropy_T.sum() / context.totals.num_tokens
        return make_routing(logits_TE, scores_TE, ids_TK, weights_TK, losses=losses)

    def select(self, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the chosen experts; padding chooses none."""
        k = self.num_needed(scores_TE) if context.k is None else context.k
        return choose(scores_TE, scores_TE, k, context)

    def num_needed(self, scores_TE: Tensor) -> Tensor:
        """Return (T,) int64: the fewest best experts of each token that reach p, or the most."""
        reached_TE = scores_TE.sort(dim=1, descending=True).values.cumsum(dim=1)
        k_T = 1 + (reached_TE < self.config.p + self.p_shift).sum(dim=1)
        return k_T.clamp(max=self.config.most_k(self.num_experts))

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Move the threshold, if there is a controller, by the mean number of experts."""
        controller, num_slots = self.config.controller, counts_E.sum().item()
        if controller is None or not num_slots:  # a step of nothing but padding
            return
        error = 1 - num_slots / num_tokens / controller.target_k
        change = controller.proportional * (error - self.last_error) + controller.integral * error
        lowest = 1 / self.num_experts  # which every token's best expert reaches
        p = (self.config.p + self.p_shift + change).clamp(lowest, 1.0)
        self.p_shift.copy_(p - self.config.p)
        self.last_error.fill_(error)
