"""Token-choice top-k routing: each token goes to the k experts with the largest scores.

Softmax over all experts and then the choice (Switch, OLMoE, Qwen3-MoE), the choice and then softmax
over it (Mixtral), or sigmoid scores with a selection bias (DeepSeek-V3, arXiv 2412.19437, eq.
12-16).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from dmoe.moe.expert_bias import update_expert_bias
from dmoe.moe.routers.base import Router, RouterGate, RouterSection
from dmoe.moe.routers.choice import choose, divided_by_sum, scores_of, softmax_over_choice
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.rng import stream_key, token_uniform


class TopKConfig(RouterSection):
    """Each token goes to its `top_k` best experts."""

    takes_gate_threshold: ClassVar[bool] = True

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

    @property
    def fixed_k(self) -> int:
        """Experts of every token where the context does not say."""
        return self.top_k

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
        return choose(scores_TE + self.expert_bias_E, scores_TE, k, context)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Return the (T, K) gates of the chosen experts, 0 in unused slots."""
        if self.config.order == "select_then_score" and self.config.score == "softmax":
            weights_TK = softmax_over_choice(ids_TK, logits_TE)
        else:
            # A sigmoid does not depend on the other experts, so its order makes no difference.
            weights_TK = scores_of(ids_TK, scores_TE)
        if self.config.normalize:
            weights_TK = divided_by_sum(weights_TK)
        return weights_TK * self.config.scaling_factor

    def end_step(self, counts_E: Tensor, num_tokens: int) -> None:
        """Move the selection bias, if it has a rate, against the load of the step."""
        if self.config.bias_update_rate:
            update_expert_bias(self.expert_bias_E, counts_E, self.config.bias_update_rate)


def jittered(x_TD: Tensor, jitter: float, context: MoEContext) -> Tensor:
    """Multiply by U(1 - jitter, 1 + jitter) in training; the noise follows the token."""
    if not jitter or not context.training:
        return x_TD
    assert context.token_ids_T is not None, "random routing needs the tokens' numbers"
    key = stream_key(context.seed, "router_jitter", context.step, context.layer)
    noise_TD = token_uniform(key, context.token_ids_T, x_TD.shape[1])
    # In bfloat16 the usual jitter of 0.01 would be rounded to one of three values.
    return x_TD * (1 + jitter * (2 * noise_TD - 1))
