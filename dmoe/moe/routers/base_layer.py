"""BASE layers: the assignment of equally many tokens to each expert that scores highest in all.

Paper: Lewis et al., arXiv 2103.16716.
Equations: the assignment maximises the sum of scores, each expert having as many tokens; the
    gate is the sigmoid of the score (eq. 1). At inference a token goes to its best expert.
Config: `model.moe.router: {name: base_layer}`.
Differs: the assignment is exact, and over the tokens of a sequence or a micro-batch; there an
    auction approximates it over those of all workers, after a random shuffle.
Shapes: T tokens, D model dim, E experts.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmoe.moe.capacity import group_size_of
from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import choose, scores_of
from dmoe.moe.routing import MoEContext, Routing, make_routing


class BaseLayerConfig(RouterSection):
    """Tokens are assigned to experts as a whole, so that the load is even without a loss."""

    takes_k: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True
    warning: ClassVar[str] = (
        "model.moe.router.name = base_layer is not causal in training: the expert of a token "
        "depends on the tokens after it, so the training loss of a decoder is too low. Evaluation "
        "and generation take each token's best expert."
    )

    name: Literal["base_layer"]
    """Balanced assignment."""
    group: Literal["sequence", "micro_batch"] = "sequence"
    """The tokens that are assigned together. The assignment is solved on the host, in a time that
    grows with the cube of their number: 6 ms for 256 tokens, 0.2 s for 1024."""

    @property
    def fixed_k(self) -> int:
        """One expert per token."""
        return 1

    def limits(self) -> dict[str, float | None]:
        """Return nothing: there is no number to check."""
        return {}

    def build(self, *, dim: int, num_experts: int) -> "BaseLayerRouter":
        """Build the router."""
        return BaseLayerRouter(self, dim=dim, num_experts=num_experts)


class BaseLayerRouter(Router):
    """Scores every expert for every token; the gate is the sigmoid of the score (eq. 1)."""

    def __init__(self, config: BaseLayerConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(x_TD)
        ids_TK = context.decide("expert_ids", lambda: self.select(logits_TE, context))
        weights_TK = scores_of(ids_TK, logits_TE.sigmoid())
        return make_routing(logits_TE, logits_TE.softmax(-1), ids_TK, weights_TK)

    def select(self, logits_TE: Tensor, context: MoEContext) -> Tensor:
        """Return (T, 1) the expert of each token; padding has none."""
        if not context.training:
            return choose(logits_TE, logits_TE, 1, context)
        num_tokens = len(logits_TE)
        valid_T = context.valid_T
        if valid_T is None:
            valid_T = torch.ones(num_tokens, dtype=torch.bool, device=logits_TE.device)
        ids_T = torch.full((num_tokens,), -1, device=logits_TE.device)
        for rows in torch.arange(num_tokens, device=logits_TE.device).split(
            group_size_of(self.config.group, context, num_tokens)
        ):
            rows = rows[valid_T[rows]]
            ids_T[rows] = balanced_assignment(logits_TE[rows])
        return ids_T[:, None]


def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """Return (T,) int64 experts with the largest sum of scores, none with more than T / E tokens.

    That many rounded up. Exact: each expert is so many columns of a linear assignment problem.
    """
    # Here, as it takes a while, and most runs need none of it.
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_experts = scores_TE.shape
    places = -(-num_tokens // num_experts)
    # The solver refuses what is not finite. Such a step is to be found out by its loss and skipped,
    # as with any other router, so here any assignment will do.
    scores_TE = scores_TE.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scores = scores_TE.repeat_interleave(places, dim=1).cpu().numpy()
    _, columns = linear_sum_assignment(scores, maximize=True)
    return torch.from_numpy(columns // max(1, places)).to(scores_TE.device)
