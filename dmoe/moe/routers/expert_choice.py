"""Expert choice: each expert takes the tokens that score highest with it.

Paper: Zhou et al., arXiv 2202.09368.
Equations: scores and gates are softmax(W x) over experts; of the n tokens of a group each of the E
    experts takes its best n c / E. So the load is even by construction, and a token has c experts
    on average: some many, some none.
Config: `model.moe.router: {name: expert_choice, factor: 2}`.
Differs: n is of a sequence or a micro-batch, and a token may have any number of experts: the
    variant with a limit is not there. Not causal in either: whether a token is taken depends
    on the tokens after it (arXiv 2408.15664, section 5.2).
Shapes: G groups, S tokens of a group, T = G S, E experts.
"""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import scores_of, slots_of
from dmoe.moe.routing import MoEContext, Routing, make_routing


class ExpertChoiceConfig(RouterSection):
    """Experts choose tokens: even load, but a decoder trained so looks into the future."""

    takes_k: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True
    warning: ClassVar[str] = (
        "model.moe.router.name = expert_choice is not causal: in training an expert compares a "
        "token with those after it, so the loss of a decoder is too low, and text is generated "
        "with other choices than in training. Use it for encoders and for comparison."
    )

    name: Literal["expert_choice"]
    """Each expert takes its best tokens."""
    factor: PositiveFloat = 2.0
    """Mean experts per token, c: an expert takes factor x tokens / experts of a group, rounded
    down, and one at least."""
    group: Literal["sequence", "micro_batch"] = "sequence"
    """The tokens among which an expert chooses."""

    def limits(self) -> dict[str, float | None]:
        """Return what must not be above the number of experts, by the keys of `model.moe`."""
        return {"router.factor": self.factor}

    def nominal_k(self, num_experts: int) -> float:
        """Return the mean number of experts per token."""
        return self.factor

    def most_k(self, num_experts: int) -> int:
        """Return the most experts that may take a token: all."""
        return num_experts

    def build(self, *, dim: int, num_experts: int) -> "ExpertChoiceRouter":
        """Build the router."""
        return ExpertChoiceRouter(self, dim=dim, num_experts=num_experts)


class ExpertChoiceRouter(Router):
    """Scores every expert for every token by a softmax over experts, and lets experts choose."""

    def __init__(self, config: ExpertChoiceConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        ids_TK = context.decide("expert_ids", lambda: self.select(scores_TE, context))
        return make_routing(logits_TE, scores_TE, ids_TK, scores_of(ids_TK, scores_TE))

    def select(self, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the experts that take each token; ties go to the first token."""
        size = context.seq_len if self.config.group == "sequence" else len(scores_TE)
        taken_TE = best_tokens(scores_TE, max(1, size), self.config.factor, context.valid_T)
        return slots_of(taken_TE)


def best_tokens(scores_TE: Tensor, size: int, factor: float, valid_T: Tensor | None) -> Tensor:
    """Return (T, E) bool: in each group of `size` tokens the best factor x tokens / E an expert.

    That many rounded down, and one at least where there is a token. Padding does not count.
    """
    num_tokens, num_experts = scores_TE.shape
    if valid_T is None:
        valid_T = torch.ones(num_tokens, dtype=torch.bool, device=scores_TE.device)
    valid_GS = valid_T.view(-1, size)
    num_G = (valid_GS.sum(1) * factor / num_experts).long().clamp(min=1)
    keys_GSE = scores_TE.view(-1, size, num_experts).masked_fill(~valid_GS[:, :, None], -torch.inf)
    order_GSE = keys_GSE.argsort(dim=1, descending=True, stable=True)
    place_S = torch.arange(size, device=scores_TE.device)
    wanted_GSE = (place_S < num_G[:, None])[:, :, None].expand_as(order_GSE)
    taken_GSE = torch.zeros_like(wanted_GSE).scatter(1, order_GSE, wanted_GSE)
    return (taken_GSE & valid_GS[:, :, None]).view(num_tokens, num_experts)
