"""Expert capacity: how many slots an expert serves in a group of tokens, and which ones it drops.

Paper: Switch, arXiv 2101.03961, eq. 3; GShard, arXiv 2006.16668, section 2.2.
Equations: an expert serves ceil(factor x slots / E) of the slots of a group of tokens, `minimum` at
    least, and a slot beyond becomes -1: the token's residual carries it on.
Config: `model.moe.capacity: {factor: 1.25}`.
Differs: the factor is of slots, of which a token has K, where papers mostly count tokens. It is a
    policy on the routing, not a way to execute it; `dispatch: buffers` executes it as they do.
Shapes: T tokens, E experts, K slots per token.
"""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from dmoe.config.base import ConfigModel
from dmoe.moe.routing import MoEContext, Routing
from dmoe.ops import CapacityRule, keep_slots


class CapacityConfig(ConfigModel):
    """Limits the slots an expert serves: capacity = factor x slots / E, rounded up.

    The slots are those that the tokens of the group ask for: K a token, where all have K.
    """

    factor: PositiveFloat
    """1 leaves room for perfect balance only. Switch trains with 1.25, and so does ST-MoE, whose
    1.25 is of tokens: 0.625 of the two slots that each has."""
    eval_factor: PositiveFloat | None = None
    """The factor outside training (Switch: 2, ST-MoE: 1); null for the same."""
    policy: Literal["position", "score"] = "position"
    """Who is served: "position" all first choices in the order of the tokens, then all second ones
    (GShard); "score" the largest gates."""
    minimum: NonNegativeInt = 4
    """Slots an expert always has."""
    group: Literal["micro_batch", "sequence"] | PositiveInt = "micro_batch"
    """The tokens among which capacity is divided; a number is that of consecutive tokens of a
    micro-batch (the local groups of GShard), of which the last group may have fewer."""

    slots: Literal["used", "all"] = "used"
    """Which slots the factor is of: "used" those that tokens ask for, which may be fewer than K
    each; "all" K of each token, though it may not use its second (GShard's random one)."""

    def rule(self, context: MoEContext, num_tokens: int) -> CapacityRule:
        """Return what holds in a pass over so many tokens."""
        factor = self.factor if context.training else self.eval_factor or self.factor
        group_size = group_size_of(self.group, context, num_tokens)
        return CapacityRule(factor, self.minimum, group_size, self.policy, self.slots)


def apply_capacity(
    routing: Routing,
    config: CapacityConfig,
    context: MoEContext,
    *,
    most_k: int | None = None,
    by_triton: bool = False,
) -> Routing:
    """Return the routing with the slots beyond capacity unused.

    Args:
        routing: of a router.
        config: the section.
        context: of the layer.
        most_k: slots that a token can have, on any rank; None for all experts.
        by_triton: as in `keep_slots`.
    """
    num_tokens, num_experts = routing.scores_TE.shape
    rule = config.rule(context, num_tokens)

    def decide() -> Tensor:
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        return keep_slots(ids_TK, weights_TK, num_experts, rule, by_triton=by_triton)

    ids_TK = context.decide("kept_ids", decide)
    return routing._replace(
        expert_ids_TK=ids_TK,
        weights_TK=routing.weights_TK.masked_fill(ids_TK < 0, 0),
        num_places=rule.num_places(num_tokens, most_k or num_experts, num_experts),
    )


def group_size_of(group: str | int, context: MoEContext, num_tokens: int) -> int:
    """Return the tokens of a group, 1 at least."""
    sizes = {"sequence": context.seq_len, "micro_batch": max(1, num_tokens)}
    return group if isinstance(group, int) else sizes[group]
