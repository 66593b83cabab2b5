"""Strictly balanced gating: experts choose in training, thresholds at inference.

Paper: Shazeer et al. 2017, arXiv 1701.06538, appendix F.
Equations: in training each expert takes the m = k |X| / n tokens of a micro-batch with which its
    probability is largest; at inference a token goes to the experts whose probability is above a
    threshold that was learned to make the same choice (eq. 20).
Config: `model.moe.router: {name: batchwise, top_k: 4}`.
Differs: the batch is a micro-batch, m is rounded down and 1 at least, and the loss is divided by
    the tokens.
Shapes: T tokens, D model dim, E experts.
"""

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import divided_by_sum, scores_of, slots_of
from dmoe.moe.routers.expert_choice import best_tokens
from dmoe.moe.routers.noise import is_chosen
from dmoe.moe.routing import BatchTotals, MoEContext, Routing, make_routing


class BatchwiseConfig(RouterSection):
    """Experts take equally many tokens in training, and those above a threshold at inference."""

    takes_k: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True
    warning: ClassVar[str] = (
        "model.moe.router.name = batchwise is not causal in training: an expert compares a token "
        "with those after it, so the training loss of a decoder is too low. Evaluation and "
        "generation use thresholds, which look at nothing else."
    )

    name: Literal["batchwise"]
    """Equal load in training, learned thresholds at inference."""
    top_k: PositiveInt = 2
    """Mean experts per token in training."""
    threshold_weight: NonNegativeFloat = 0.01
    """Weight of the loss that teaches the thresholds; it has no other effect."""

    @property
    def fixed_k(self) -> None:
        """None: tokens differ."""
        return None

    def limits(self) -> dict[str, float | None]:
        """Return what must not be above the number of experts, by the keys of `model.moe`."""
        return {"router.top_k": self.top_k}

    def nominal_k(self, num_experts: int) -> float:
        """Return the mean number of experts per token in training."""
        return self.top_k

    def most_k(self, num_experts: int) -> int:
        """Return the most experts that may take a token: all."""
        return num_experts

    def loss_weights(self) -> dict[str, float]:
        """Return the weights of the losses that are the router's own (`Routing.losses`)."""
        return {"threshold": self.threshold_weight} if self.threshold_weight else {}

    def build(self, *, dim: int, num_experts: int) -> "BatchwiseRouter":
        """Build the router."""
        return BatchwiseRouter(self, dim=dim, num_experts=num_experts)


class BatchwiseRouter(Router):
    """Scores every expert for every token by a softmax; experts choose, or thresholds do."""

    def __init__(self, config: BatchwiseConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = ThresholdGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE, threshold_E = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        ids_TK = context.decide("expert_ids", lambda: self.select(scores_TE, threshold_E, context))
        weights_TK = divided_by_sum(scores_of(ids_TK, scores_TE))
        losses = {}
        if context.totals is not None:
            chosen_TE = is_chosen(ids_TK, scores_TE.shape[1])
            losses["threshold"] = threshold_loss(
                scores_TE.detach(), threshold_E, chosen_TE, context.totals, context.valid_T
            )
        return make_routing(logits_TE, scores_TE, ids_TK, weights_TK, losses=losses)

    def select(self, scores_TE: Tensor, threshold_E: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the experts of each token; padding has none."""
        if context.training:
            size = max(1, len(scores_TE))
            return slots_of(best_tokens(scores_TE, size, self.config.top_k, context.valid_T))
        chosen_TE = scores_TE > threshold_E
        if context.valid_T is not None:
            chosen_TE = chosen_TE & context.valid_T[:, None]
        return slots_of(chosen_TE)


class ThresholdGate(RouterGate):
    """The linear map to the logits, and the threshold of each expert's probability."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__(dim, num_experts)
        self.threshold = Threshold(num_experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return (T, E) logits and (E,) thresholds."""
        return super().forward(x_TD), self.threshold()


class Threshold(nn.Module):
    """A number per expert, 0 at first."""

    starts_at_zero = True

    def __init__(self, num_experts: int):
        super().__init__()
        self.value_E = nn.Parameter(torch.zeros(num_experts))

    def forward(self) -> Tensor:
        """Return the (E,) thresholds."""
        # A copy: sharding takes a parameter's memory back once its module has been called.
        return self.value_E.clone()


def threshold_loss(
    scores_TE: Tensor,
    threshold_E: Tensor,
    chosen_TE: Tensor,
    totals: BatchTotals,
    valid_T: Tensor | None,
) -> Tensor:
    """Return this micro-batch's share of L_batchwise, divided by the tokens of the global batch.

    sum (M_threshold - M_batchwise) (X - T) (eq. 20): it is 0 where both masks agree, and else grows
    with the distance of the threshold from a score that it judges otherwise. Only thresholds learn.

    Args:
        scores_TE: (T, E) probabilities X, without their gradient.
        threshold_E: (E,) T.
        chosen_TE: (T, E) bool M_batchwise.
        totals: sizes of the global batch.
        valid_T: (T,) bool, False for padding; None where there is none.
    """
    above_TE = scores_TE > threshold_E
    wrong_TE = above_TE.to(scores_TE.dtype) - chosen_TE.to(scores_TE.dtype)
    if valid_T is not None:
        wrong_TE = wrong_TE * valid_T[:, None]
    return (wrong_TE * (scores_TE - threshold_E)).sum() / totals.num_tokens
