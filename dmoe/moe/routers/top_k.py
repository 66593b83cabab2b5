"""Token-choice top-k routing: each token goes to the k experts with the largest scores.

Softmax over all experts and then the choice (Switch, OLMoE, Qwen3-MoE), the choice and then softmax
over it (Mixtral), or sigmoid scores with a selection bias (DeepSeek-V3, arXiv 2412.19437, eq.
12-16).
"""

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from dmoe.config.base import ConfigModel
from dmoe.moe.expert_bias import update_expert_bias
from dmoe.moe.routers.base import Router, RouterGate
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.ops import top_k_ids
from dmoe.rng import stream_key, token_uniform


class TopKConfig(ConfigModel):
    """Each token goes to its `top_k` best experts."""

    name: Literal["top_k"] = "top_k"
    """Token-choice top-k routing."""
    top_k: PositiveInt = 2
    """Experts per token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Turns logits into scores, in float32."""
    order: Literal["score_then_select", "select_then_score"] = "score_then_select"
    """Whether scores are taken over all experts or over the chosen ones."""
    normalize: bool = True
    """Divide a token's gates by their sum. With `top_k` 1 the gate is then always 1, and the router
    learns from the balance losses alone."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies the gates (2.5 in DeepSeek-V3)."""
    jitter: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The router's input is multiplied by U(1 - jitter, 1 + jitter) in training (Switch: 0.01)."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Step of the loss-free balancing bias, 0 to have none (DeepSeek-V3: 0.001)."""

    def build(self, *, dim: int, num_experts: int) -> "TopKRouter":
        """Build the router."""
        return TopKRouter(self, dim=dim, num_experts=num_experts)


class TopKRouter(Router):
    """Scores every expert for every token and chooses k."""

    def __init__(self, config: TopKConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts)
        # Selection only: the bias never enters a gate (arXiv 2408.15664, section 3). It stays in
        # use where a later run sets its rate to zero, as DeepSeek-V3 did at the end.
        self.expert_bias_E: Tensor
        self.register_buffer("expert_bias_E", torch.zeros(num_experts))

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(jittered(x_TD, self.config.jitter, context))
        scores_TE = logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()
        ids_TK = context.decide("expert_ids", lambda: self.select(scores_TE, context))
        weights_TK = self.weigh(logits_TE, scores_TE, ids_TK)
        if self.config.score == "sigmoid":
            scores_TE = divided_by_sum(scores_TE)
        return make_routing(logits_TE, scores_TE, ids_TK, weights_TK)

    def select(self, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the chosen experts; padding chooses none."""
        k = self.config.top_k if context.k is None else context.k
        num_slots = k if isinstance(k, int) else int(k.max())
        ids_TK = top_k_ids(scores_TE + self.expert_bias_E, num_slots)
        if isinstance(k, Tensor):
            place_K = torch.arange(ids_TK.shape[1], device=ids_TK.device)
            ids_TK = ids_TK.masked_fill(place_K >= k[:, None], -1)
        if context.valid_T is None:
            return ids_TK
        return ids_TK.masked_fill(~context.valid_T[:, None], -1)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Return the (T, K) gates of the chosen experts, 0 in unused slots."""
        used_TK, ids_TK = ids_TK >= 0, ids_TK.clamp(min=0)
        if self.config.order == "select_then_score" and self.config.score == "softmax":
            # Finite, as a token without experts would else divide 0 by 0.
            logits_TK = logits_TE.gather(1, ids_TK).masked_fill(~used_TK, -1e30)
            weights_TK = logits_TK.softmax(-1)
        else:
            # A sigmoid does not depend on the other experts, so its order makes no difference.
            weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK.masked_fill(~used_TK, 0)
        if self.config.normalize:
            weights_TK = divided_by_sum(weights_TK)
        return weights_TK * self.config.scaling_factor

    def end_step(self, counts_E: Tensor) -> None:
        """Move the selection bias, if it has a rate, against the load of the step."""
        if self.config.bias_update_rate:
            update_expert_bias(self.expert_bias_E, counts_E, self.config.bias_update_rate)


def divided_by_sum(scores: Tensor) -> Tensor:
    """Divide each row by its sum."""
    # Sigmoid scores may all vanish; this keeps 0 / 0 out, and infinity out of the gradient.
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


def jittered(x_TD: Tensor, jitter: float, context: MoEContext) -> Tensor:
    """Multiply by U(1 - jitter, 1 + jitter) in training; the noise follows the token."""
    if not jitter or not context.training:
        return x_TD
    assert context.token_ids_T is not None, "random routing needs the tokens' numbers"
    key = stream_key(context.seed, "router_jitter", context.step, context.layer)
    noise_TD = token_uniform(key, context.token_ids_T, x_TD.shape[1])
    # In bfloat16 the usual jitter of 0.01 would be rounded to one of three values.
    return x_TD * (1 + jitter * (2 * noise_TD - 1))
