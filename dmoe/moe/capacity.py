"""Expert capacity: how many slots an expert serves in a group of tokens, and which ones it drops.

Capacity is a policy on the routing, not a way to execute it: a dropped slot becomes -1 and the
token's residual carries it on (Switch, arXiv 2101.03961, eq. 3; GShard, arXiv 2006.16668, section
2.2). Shapes: T tokens, E experts, K slots per token, G groups of tokens.
"""

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from dmoe.config.base import ConfigModel
from dmoe.moe.routing import MoEContext, Routing


class CapacityConfig(ConfigModel):
    """Limits the slots an expert serves: capacity = factor x slots / E, rounded up.

    The slots are those that the tokens of the group ask for: K a token, where all have K.
    """

    factor: PositiveFloat
    """1 leaves room for perfect balance only; Switch and ST-MoE train with 1.25."""
    eval_factor: PositiveFloat | None = None
    """The factor outside training (Switch and ST-MoE: 2); null for the same."""
    policy: Literal["position", "score"] = "position"
    """Who is served: "position" all first choices in the order of the tokens, then all second ones
    (GShard); "score" the largest gates."""
    minimum: NonNegativeInt = 4
    """Slots an expert always has."""
    group: Literal["micro_batch", "sequence"] | PositiveInt = "micro_batch"
    """The tokens among which capacity is divided; a number is that of consecutive tokens of a
    micro-batch (the local groups of GShard), of which the last group may have fewer."""

    def factor_of(self, context: MoEContext) -> float:
        """Return the factor of a pass."""
        return self.factor if context.training else self.eval_factor or self.factor


def apply_capacity(routing: Routing, config: CapacityConfig, context: MoEContext) -> Routing:
    """Return the routing with the slots beyond capacity unused."""
    ids_TK = context.decide("kept_ids", lambda: keep_within_capacity(routing, config, context))
    return routing._replace(
        expert_ids_TK=ids_TK, weights_TK=routing.weights_TK.masked_fill(ids_TK < 0, 0)
    )


def group_size_of(group: str | int, context: MoEContext, num_tokens: int) -> int:
    """Return the tokens of a group, 1 at least."""
    sizes = {"sequence": context.seq_len, "micro_batch": max(1, num_tokens)}
    return group if isinstance(group, int) else sizes[group]


def keep_within_capacity(routing: Routing, config: CapacityConfig, context: MoEContext) -> Tensor:
    """Return (T, K) expert ids, -1 for the slots that are unused or dropped."""
    ids_TK, num_experts = routing.expert_ids_TK, routing.scores_TE.shape[1]
    num_tokens, top_k = ids_TK.shape
    group_size = group_size_of(config.group, context, num_tokens)
    if not num_tokens:
        return ids_TK
    group_T = torch.arange(num_tokens, device=ids_TK.device) // group_size
    bin_TK = group_T[:, None] * num_experts + ids_TK
    used_TK = ids_TK >= 0
    # Slots in order of preference, unused ones last; a stable sort by bin keeps that order in a
    # bin.
    if config.policy == "score":
        key_TK = routing.weights_TK.masked_fill(~used_TK, -torch.inf)
        preference = key_TK.flatten().argsort(descending=True, stable=True)
    else:
        slots_TK = torch.arange(num_tokens * top_k, device=ids_TK.device).view(num_tokens, top_k)
        preference = slots_TK.T.flatten()
    num_bins = -(-num_tokens // group_size) * num_experts
    bins = bin_TK.masked_fill(~used_TK, num_bins).flatten()[preference]
    sorted_bins, order = bins.sort(stable=True)
    counts = torch.bincount(bins, minlength=num_bins + 1)
    rank = torch.arange(len(bins), device=bins.device) - (counts.cumsum(0) - counts)[sorted_bins]
    slots_G = counts[:num_bins].view(-1, num_experts).sum(1)
    factor = config.factor_of(context)
    capacity_G = (factor * slots_G.double() / num_experts).ceil().clamp(min=config.minimum)
    kept = rank < capacity_G[sorted_bins.clamp(max=num_bins - 1) // num_experts]
    kept_TK = torch.empty_like(used_TK.flatten())
    kept_TK[preference[order]] = kept
    return ids_TK.masked_fill(~kept_TK.view_as(ids_TK), -1)


def keep_within_capacity_loop(
    routing: Routing, config: CapacityConfig, context: MoEContext
) -> Tensor:
    """Define `keep_within_capacity`, one slot at a time."""
    ids_TK, num_experts = routing.expert_ids_TK.clone(), routing.scores_TE.shape[1]
    num_tokens, top_k = ids_TK.shape
    group_size = group_size_of(config.group, context, num_tokens)
    for start in range(0, num_tokens, group_size):
        tokens = range(start, min(start + group_size, num_tokens))
        slots = [(t, k) for k in range(top_k) for t in tokens if ids_TK[t, k] >= 0]
        wanted = config.factor_of(context) * len(slots) / num_experts
        capacity = max(config.minimum, -int(-wanted // 1))
        if config.policy == "score":
            slots = sorted(
                sorted(slots), key=lambda slot: routing.weights_TK[slot].item(), reverse=True
            )
        served = [0] * num_experts
        for slot in slots:
            expert = int(ids_TK[slot])
            if served[expert] == capacity:
                ids_TK[slot] = -1
            else:
                served[expert] += 1
    return ids_TK
