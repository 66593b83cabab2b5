"""Sinkhorn routing: top-k of probabilities brought to even column sums.

Paper: Clark et al. 2022, arXiv 2202.01169, appendix B: the S-BASE router, a soft form of BASE's.
Equations: the rows of exp(logits) are scaled to sum to 1 and its columns to the same share of
    tokens, in turn; a token goes to its largest entry, with its plain probability as gate. At
    inference its largest logit decides.
Config: `model.moe.router: {name: sinkhorn}`.
Differs: the number of iterations is fixed.
Shapes: G groups, S tokens of a group, T = G S, E experts.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from dmoe.moe.capacity import group_size_of
from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import choose, scores_of
from dmoe.moe.routing import MoEContext, Routing, make_routing


class SinkhornConfig(RouterSection):
    """Each token goes to its best experts once the experts' columns are made even."""

    balances_itself: ClassVar[bool] = True
    warning: ClassVar[str] = (
        "model.moe.router.name = sinkhorn is not causal in training: the expert of a token depends "
        "on the tokens after it, so the training loss of a decoder is too low. Evaluation and "
        "generation take each token's best expert."
    )

    name: Literal["sinkhorn"]
    """Sinkhorn-normalised top-k."""
    top_k: PositiveInt = 1
    """Experts per token."""
    iterations: PositiveInt = 20
    """How often columns and rows are scaled in turn."""
    group: Literal["sequence", "micro_batch"] = "micro_batch"
    """The tokens over which the columns are made even."""

    def build(self, *, dim: int, num_experts: int) -> "SinkhornRouter":
        """Build the router."""
        return SinkhornRouter(self, dim=dim, num_experts=num_experts)


class SinkhornRouter(Router):
    """Scores every expert for every token and evens out the columns in training."""

    def __init__(self, config: SinkhornConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        ids_TK = context.decide("expert_ids", lambda: self.select(logits_TE, scores_TE, context))
        return make_routing(logits_TE, scores_TE, ids_TK, scores_of(ids_TK, scores_TE))

    def select(self, logits_TE: Tensor, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the chosen experts; padding chooses none."""
        keys_TE = logits_TE
        if context.training:
            size = group_size_of(self.config.group, context, len(logits_TE))
            keys_TE = even_columns(logits_TE, size, self.config.iterations, context.valid_T)
        k = context.k_or(self.config.top_k)
        return choose(keys_TE, scores_TE, k, context)


def even_columns(
    logits_TE: Tensor, size: int, iterations: int, valid_T: Tensor | None = None
) -> Tensor:
    """Return (T, E) logits whose exponentials have, in each group of tokens, even column sums.

    Rows sum to 1 and columns to tokens / E, as nearly as the iterations bring them there; the last
    scaling is that of the columns. Padding does not count.
    """
    num_tokens, num_experts = logits_TE.shape
    if valid_T is None:
        valid_T = torch.ones(num_tokens, dtype=torch.bool, device=logits_TE.device)
    valid_GS1 = valid_T.view(-1, size, 1)
    # Finite, as a group of nothing but padding would else subtract infinity from infinity.
    logits_GSE = logits_TE.view(-1, size, num_experts).masked_fill(~valid_GS1, -1e30)
    share_G11 = valid_GS1.sum(1, keepdim=True).clamp(min=1).log() - math.log(num_experts)
    rows_GS1 = torch.zeros_like(logits_GSE[..., :1])
    for _ in range(iterations):
        columns_G1E = share_G11 - (logits_GSE + rows_GS1).logsumexp(1, keepdim=True)
        rows_GS1 = -(logits_GSE + columns_G1E).logsumexp(2, keepdim=True)
        rows_GS1 = rows_GS1.masked_fill(~valid_GS1, 0)
    columns_G1E = share_G11 - (logits_GSE + rows_GS1).logsumexp(1, keepdim=True)
    return (logits_GSE + rows_GS1 + columns_G1E).view(num_tokens, num_experts)
