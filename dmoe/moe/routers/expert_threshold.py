"""Expert threshold: an expert takes each token whose score is above the expert's threshold.

Paper: arXiv 2603.11535.
Equations: scores and gates are sigmoid(W x). The threshold is a running mean of the score that the
    expert's last token would have if the expert chose its share of each batch (expert choice). It
    comes from batches before this one, so the routing is causal, tokens have as many experts as
    their scores earn, and the load is even on average without a loss.
Config: `model.moe.router: {name: expert_threshold, target_k: 2}`.
Differs: the score of the last token is that of each micro-batch, and their mean is taken, by
    tokens, so that no layout changes it.
Shapes: T tokens, E experts, K slots per token.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import choose, divided_by_sum, scores_of, slots_of
from dmoe.moe.routing import MoEContext, Routing, make_routing


class ExpertThresholdConfig(RouterSection):
    """Each expert takes the tokens that score above its threshold, one share of all on average."""

    balances_itself: ClassVar[bool] = True

    name: Literal["expert_threshold"]
    """Scores are sigmoids, which are the gates as well."""
    target_k: float = Field(default=2.0, gt=0)
    """Mean experts per token: each expert's share of the tokens is target_k / experts."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the running mean, a step. Before the first step there are no thresholds, and experts take
    their share of the micro-batch."""

    def limits(self) -> dict[str, float | None]:
        """Return what must not be above the number of experts, by the keys of `model.moe`."""
        return {"router.target_k": self.target_k}

    def nominal_k(self, num_experts: int) -> float:
        """Return the target."""
        return self.target_k

    def most_k(self, num_experts: int) -> int:
        """Return the most experts that a token may have where the context does not say."""
        return num_experts

    def build(self, *, dim: int, num_experts: int) -> "ExpertThresholdRouter":
        """Build the router."""
        return ExpertThresholdRouter(self, dim=dim, num_experts=num_experts)


class ExpertThresholdRouter(Router):
    """Compares every score with the threshold of its expert."""

    def __init__(self, config: ExpertThresholdConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)
        # Zero at the start, as buffers are; divided by the sum of its weights, as in Adam.
        self.cutoff_E: Tensor
        self.weight_sum: Tensor
        self.register_buffer("cutoff_E", torch.zeros(num_experts))
        self.register_buffer("weight_sum", torch.zeros(()))

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        ids_TK = context.decide("expert_ids", lambda: self.select(scores_TE, context))
        sums = {}
        if context.training:
            cutoff_E, num_valid = self.cutoffs(scores_TE.detach(), context.valid_T)
            sums["cutoff"] = cutoff_E * num_valid
        weights_TK = scores_of(ids_TK, scores_TE)
        return make_routing(logits_TE, divided_by_sum(scores_TE), ids_TK, weights_TK, sums)

    def select(self, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the experts that take each token; padding has none.

        Where the context says how many experts a token has, they are its best ones.
        """
        if context.k is not None:
            return choose(scores_TE, scores_TE, context.k, context)
        taken_TE = scores_TE > self.thresholds()
        if not self.weight_sum:
            taken_TE = scores_TE >= self.cutoffs(scores_TE, context.valid_T)[0]
        if context.valid_T is not None:
            taken_TE = taken_TE & context.valid_T[:, None]
        return slots_of(taken_TE)

    def thresholds(self) -> Tensor:
        """Return (E,) the thresholds; without meaning before the first step."""
        return self.cutoff_E / self.weight_sum

    def cutoffs(self, scores_TE: Tensor, valid_T: Tensor | None) -> tuple[Tensor, int]:
        """Return (E,) the score of the last token in each expert's share, and the tokens there are.

        The share is tokens x target_k / E, rounded, and one token at least.
        """
        if valid_T is not None:
            scores_TE = scores_TE[valid_T]
        num_tokens, num_experts = scores_TE.shape
        if not num_tokens:
            return scores_TE.new_zeros(num_experts), 0
        share = max(1, round(num_tokens * self.config.target_k / num_experts))
        return scores_TE.topk(share, dim=0).values[-1], num_tokens

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Move the running means towards the cutoffs of the step."""
        assert means is not None, "the cutoffs of the step"
        if not means["cutoff"].any():  # a step of nothing but padding: scores are above 0
            return
        decay = self.config.decay
        self.cutoff_E.mul_(decay).add_((1 - decay) * means["cutoff"].to(self.cutoff_E))
        self.weight_sum.mul_(decay).add_(1 - decay)
