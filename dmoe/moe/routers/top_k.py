"""Top-k routing: each token goes to the k experts with the largest scores.

Paper: Switch (arXiv 2101.03961), GShard (2006.16668), Mixtral (2401.04088), DeepSeekMoE, V2 and V3
    (2401.06066, 2405.04434, 2412.19437), OLMoE (2409.02060), Qwen3-MoE (2505.09388).
Equations: scores are softmax(W x), or sigmoid(W x); the k largest of scores + bias are chosen, and
    their scores, without the bias, are the gates, over their sum where `normalize` is set, times
    `scaling_factor`. With
    `order: select_then_score` gates are a softmax over the chosen logits (Mixtral). With `groups`
    only experts of a token's best groups can be chosen, such as those of a node (DeepSeek-V2, V3).
    With `second_choice: random` the second expert is used with probability min(1, 2 g2) in training
    (GShard).
Config: `model.moe.router: {name: top_k, top_k: 2}`.
Differs: where a token has more experts than in training, it uses as many groups as hold them.
Shapes: T tokens, D model dim, E experts, K slots per token, G groups, s experts of a group.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.expert_bias import update_expert_bias
from dmoe.moe.routers.base import Router, RouterGate, RouterPrecision, RouterSection
from dmoe.moe.routers.choice import (
    choose,
    divided_by_sum,
    most_slots,
    scores_of,
    softmax_over_choice,
    without_random_second,
)
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.ops import top_k_ids, uses_kernels
from dmoe.ops.routing import GateForm, select_experts, weigh_experts
from dmoe.rng import stream_key, token_uniform

if TYPE_CHECKING:  # the section that holds this one
    from dmoe.moe.config import MoEConfig


class GroupsConfig(ConfigModel):
    """Group-limited routing: experts lie in equal groups of consecutive ids, and a token uses few.

    With a group for each node, or each rank, a token is sent to so many of them at most.
    """

    num: PositiveInt
    """Groups of experts (DeepSeek-V3: 8, one a node)."""
    used: PositiveInt
    """Groups that a token may use (DeepSeek-V3: 4; V2: 3). More, where it has more experts than
    these groups hold."""
    scored_by: PositiveInt | None = None
    """The score of a group is the sum of so many best scores in it, bias included; null for
    top_k / used rounded down, as in DeepSeek-V3, and one at least. 1 is the best score, as in
    DeepSeek-V2."""

    def scored(self, top_k: int) -> int:
        """Return how many scores of a group are summed."""
        return self.scored_by or max(1, top_k // self.used)


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
    second_choice: Literal["always", "random"] = "always"
    """Whether a token's second expert is always used, or in training with probability min(1, 2 g),
    g its gate (GShard); for `top_k` 2 with `normalize`."""
    precision: RouterPrecision = "fp32"
    """Of logits and scores; "bf16" is here to show what it costs (Switch, table 2)."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Step of the loss-free balancing bias, 0 to have none (DeepSeek-V3: 0.001)."""
    groups: GroupsConfig | None = None
    """Take the experts of a token from its best groups of experts alone; null for no such limit."""

    @model_validator(mode="after")
    def _second_choice_is_one_of_two(self) -> "TopKConfig":
        if self.second_choice == "random" and not (self.top_k == 2 and self.normalize):
            raise ConfigError(
                f"second_choice = random is for top_k = 2 with normalize: true, and here they are "
                f"{self.top_k} and {str(self.normalize).lower()}: change these, or set "
                f"second_choice to always",
                key="second_choice",
            )
        return self

    @model_validator(mode="after")
    def _groups_hold_a_token(self) -> "TopKConfig":
        if self.groups is not None and self.groups.used > self.groups.num:
            raise ConfigError(
                f"groups.used = {self.groups.used} is more than groups.num = {self.groups.num}: "
                f"change either",
                key="groups.used",
            )
        return self

    def check(self, moe: "MoEConfig") -> None:
        """Check the second choice, and the groups against the number of experts.

        Raises:
            ConfigError: there may be no second choice, or groups are not equally large, or too
                small for a token's experts or score.
        """
        if self.second_choice == "random" and moe.elastic is not None:
            raise ConfigError(
                "router.second_choice = random is for two experts a token, and elastic draws how "
                "many: leave either out",
                key="router.second_choice",
            )
        groups, num_experts = self.groups, moe.experts
        if groups is None:
            return
        if num_experts % groups.num:
            raise ConfigError(
                f"router.groups.num = {groups.num} does not divide num_experts = {num_experts} "
                f"into equal groups: change either",
                key="router.groups.num",
            )
        size = num_experts // groups.num
        if self.top_k > groups.used * size:
            raise ConfigError(
                f"router.top_k = {self.top_k} is more than the {groups.used * size} experts of "
                f"router.groups.used = {groups.used} groups of {size}: raise groups.used, or lower "
                f"either of the others",
                key="router.groups.used",
            )
        if groups.scored(self.top_k) > size:
            raise ConfigError(
                f"router.groups.scored_by = {groups.scored(self.top_k)} is more than the {size} "
                f"experts of a group: lower it",
                key="router.groups.scored_by",
            )

    def build(self, *, dim: int, num_experts: int) -> "TopKRouter":
        """Build the router."""
        return TopKRouter(self, dim=dim, num_experts=num_experts)


class TopKRouter(Router):
    """Scores every expert for every token and chooses k."""

    def __init__(self, config: TopKConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = RouterGate(dim, num_experts, config.precision)
        # Selection only: the bias never enters a gate (arXiv 2408.15664, section 3). It stays in
        # use where a later run sets its rate to zero, as DeepSeek-V3 did at the end.
        self.expert_bias_E: Tensor
        self.register_buffer("expert_bias_E", torch.zeros(num_experts))

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        logits_TE = self.gate(jittered(x_TD, self.config.jitter, context))
        if self.kernels_serve(x_TD):
            return self.by_kernels(logits_TE, context)
        scores_TE = self.score(logits_TE)
        ids_TK = context.decide("expert_ids", lambda: self.select(scores_TE, context))
        weights_TK = self.weigh(logits_TE, scores_TE, ids_TK)
        if self.config.second_choice == "random" and context.training:
            gates_TK = weights_TK.detach() / self.config.scaling_factor
            ids_TK = context.decide(
                "sent_ids", lambda: without_random_second(ids_TK, gates_TK, context)
            )
        if self.config.score == "sigmoid":
            scores_TE = divided_by_sum(scores_TE)
        return make_routing(logits_TE, scores_TE, ids_TK, weights_TK)

    def score(self, logits_TE: Tensor) -> Tensor:
        """Return (T, E) softmax or sigmoid scores, in the router's precision."""
        logits = logits_TE.bfloat16() if self.config.precision == "bf16" else logits_TE
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        return scores.to(logits_TE.dtype)

    def select(self, scores_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the chosen experts; padding chooses none."""
        k = context.k_or(self.config.top_k)
        keys_TE = scores_TE + self.expert_bias_E
        if self.config.groups is not None:
            scored = self.config.groups.scored(self.config.top_k)
            keys_TE = within_groups(keys_TE, self.config.groups, scored, k, context.k_ideal)
        return choose(keys_TE, scores_TE, k, context)

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

    def kernels_serve(self, x_TD: Tensor) -> bool:
        """Say whether there are kernels for this router, here and for these tokens."""
        plain = self.config.precision != "bf16" and self.config.second_choice != "random"
        return plain and uses_kernels(self.backend, x_TD.device, x_TD.dtype)

    def by_kernels(self, logits_TE: Tensor, context: MoEContext) -> Routing:
        """Route by the kernels: the same, in a few launches and no wait for the device."""
        config = self.config
        k = context.k_or(config.top_k)

        def select() -> Tensor:
            if config.groups or context.k_ideal is not None or context.gate_threshold:
                return self.select(self.score(logits_TE), context)
            return select_experts(
                logits_TE, self.expert_bias_E, k, most_slots(k), context.valid_T, config.score
            )

        ids_TK = context.decide("expert_ids", select)
        over_choice = config.order == "select_then_score" and config.score == "softmax"
        form = GateForm(config.score, over_choice, config.normalize, config.scaling_factor)
        scores_TE, weights_TK = weigh_experts(logits_TE, ids_TK, form)
        return make_routing(logits_TE, scores_TE, ids_TK, weights_TK)

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Move the selection bias, if it has a rate, against the load of the step."""
        if self.config.bias_update_rate:
            update_expert_bias(self.expert_bias_E, counts_E, self.config.bias_update_rate)


def within_groups(
    keys_TE: Tensor, groups: GroupsConfig, scored: int, k: int | Tensor, k_ideal: int | None
) -> Tensor:
    """Return the keys, at -inf outside the best groups of each token.

    Args:
        keys_TE: (T, E) scores with their bias.
        groups: how many there are, and how many a token uses.
        scored: best keys of a group that make its score.
        k: experts of every token, or (T,) int64 of each.
        k_ideal: the best experts that they are drawn from, if they are.
    """
    num_tokens, num_experts = keys_TE.shape
    size = num_experts // groups.num
    keys_TGs = keys_TE.view(num_tokens, groups.num, size)
    order_TG = top_k_ids(keys_TGs.topk(scored, dim=-1).values.sum(-1), groups.num)
    # A larger number of experts than in training, in fewer groups than hold it, has those as well.
    wanted_T1 = torch.as_tensor(k if k_ideal is None else k_ideal, device=keys_TE.device)
    needed_T1 = (-(-wanted_T1 // size)).clamp(min=groups.used).expand(num_tokens)[:, None]
    place_G = torch.arange(groups.num, device=keys_TE.device)
    used_TG = torch.empty_like(order_TG, dtype=torch.bool)
    used_TG.scatter_(1, order_TG, place_G < needed_T1)
    return keys_TGs.masked_fill(~used_TG[:, :, None], -torch.inf).view_as(keys_TE)


def jittered(x_TD: Tensor, jitter: float, context: MoEContext) -> Tensor:
    """Multiply by U(1 - jitter, 1 + jitter) in training; the noise follows the token."""
    if not jitter or not context.training:
        return x_TD
    assert context.token_ids_T is not None, "random routing needs the tokens' numbers"
    key = stream_key(context.seed, "router_jitter", context.step, context.layer)
    noise_TD = token_uniform(key, context.token_ids_T, x_TD.shape[1])
    # In bfloat16 the usual jitter of 0.01 would be rounded to one of three values.
    return x_TD * (1 + jitter * (2 * noise_TD - 1))
