"""SparseMixer: sampled experts, with a gradient for the choice itself.

Paper: Liu et al., arXiv 2310.00811; GRIN, arXiv 2409.12136, section 2 (Phi-3.5-MoE).
Equations: one expert after the other is drawn from a softmax over those whose logit is close to the
    best that is left. The gradient of its gate is that of an estimate, by Heun's third-order
    method, of how the expected output changes: a draw that is not the best counts a quarter of
    the time at its whole gate and else at a third of it.
Config: `model.moe.router: {name: sparse_mixer, top_k: 2}`.
Differs: any number of experts can be drawn.
Shapes: T tokens, E experts, K slots per token.
"""

from functools import cache
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import most_slots, scores_of
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.ops import top_k_ids
from dmoe.rng import stream_key, token_uniform

# How often a draw that is not the best counts whole, and what it counts else.
_WHOLE, _PART = 0.25, 1 / 3


class SparseMixerConfig(RouterSection):
    """Experts are drawn at random from the close ones; at inference they are the best."""

    takes_gate_threshold: ClassVar[bool] = False

    name: Literal["sparse_mixer"]
    """Sampled choice with a gradient estimate."""
    top_k: PositiveInt = 2
    """Experts per token."""
    jitter: float = Field(default=0.01, ge=0)
    """An expert is close whose logit is below the best by no more than 2 jitter times the larger of
    the best and its own size (Phi-3.5-MoE: 0.01)."""

    def build(self, *, dim: int, num_experts: int) -> "SparseMixerRouter":
        """Build the router."""
        return SparseMixerRouter(self, dim=dim, num_experts=num_experts)


class Draw(NamedTuple):
    """What was drawn, and from what."""

    ids_TK: Tensor
    """(T, K) int64 experts, in the order in which they were drawn; -1 where unused."""
    close_TKE: Tensor
    """(T, K, E) bool, the experts that each was drawn from."""
    factors_TK: Tensor
    """(T, K) what each gate is multiplied by, forward alone."""


class SparseMixerRouter(Router):
    """Draws k experts without putting them back."""

    def __init__(self, config: SparseMixerConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(x_TD)
        draw = cache(lambda: self.select(logits_TE.detach(), context))
        ids_TK = context.decide("expert_ids", lambda: draw().ids_TK)
        close_TKE = context.decide("close_experts", lambda: draw().close_TKE)
        factors_TK = context.decide("gate_factors", lambda: draw().factors_TK)
        drawn_TKE = logits_TE[:, None, :].masked_fill(~close_TKE, -torch.inf).softmax(-1)
        gates_TK = scores_of(ids_TK.flatten()[:, None], drawn_TKE.flatten(0, 1)).view_as(ids_TK)
        # The factor acts forward; backward goes by the whole gate.
        weights_TK = gates_TK + (factors_TK - 1) * gates_TK.detach()
        return make_routing(logits_TE, logits_TE.softmax(-1), ids_TK, weights_TK)

    def select(self, logits_TE: Tensor, context: MoEContext) -> Draw:
        """Draw the experts of every token, with what their gates need; padding has none."""
        k = context.k_or(self.config.top_k)
        left_TE, steps = logits_TE, []
        for slot in range(most_slots(k)):
            best_T1 = left_TE.amax(1, keepdim=True)
            distance_TE = (best_T1 - left_TE) / logits_TE.abs().maximum(best_T1)
            # At the best itself 0 / 0, where all logits are 0.
            close_TE = (distance_TE <= 2 * self.config.jitter) | (left_TE == best_T1)
            keys_TE = left_TE.masked_fill(~close_TE, -torch.inf)
            ids_T1, factors_T1 = self._draw_one(keys_TE, slot, context)
            steps.append((ids_T1, close_TE[:, None], factors_T1))
            left_TE = left_TE.scatter(1, ids_T1, -torch.inf)
        ids_TK, close_TKE, factors_TK = (
            torch.cat(parts, dim=1) for parts in zip(*steps, strict=True)
        )
        unused_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
        if isinstance(k, Tensor):
            unused_TK |= torch.arange(ids_TK.shape[1], device=k.device) >= k[:, None]
        if context.valid_T is not None:
            unused_TK |= ~context.valid_T[:, None]
        return Draw(ids_TK.masked_fill(unused_TK, -1), close_TKE, factors_TK)

    def _draw_one(self, keys_TE: Tensor, slot: int, context: MoEContext) -> tuple[Tensor, Tensor]:
        """Return (T, 1) ids drawn from the softmax of the keys, and their (T, 1) factors."""
        best_T1 = top_k_ids(keys_TE, 1)
        if not context.training:
            return best_T1, torch.ones_like(keys_TE[:, :1])
        assert context.token_ids_T is not None, "random routing needs the tokens' numbers"
        key = stream_key(context.seed, "sparse_mixer", context.step, context.layer, slot)
        uniform_TE1 = token_uniform(key, context.token_ids_T, keys_TE.shape[1] + 1).to(keys_TE)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        gumbel_TE = -(-uniform_TE1[:, :-1].clamp(min=2.0**-25).log()).log()
        drawn_T1 = top_k_ids(keys_TE + gumbel_TE, 1)
        whole_T1 = (drawn_T1 == best_T1) | (uniform_TE1[:, -1:] < _WHOLE)
        return drawn_T1, torch.where(whole_T1, 1.0, _PART).to(keys_TE)
