"""Expert capacity: which slots an expert serves, by their position in it.

The position of a slot is how many slots of its group of tokens go before it and have the same
expert; it is served where that is less than the group's capacity. Shapes: T tokens, E experts, K
slots per token, G groups of tokens, S slots of a group.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CapacityRule(NamedTuple):
    """How many slots an expert has in a group, and who goes first."""

    factor: float
    """Capacity = factor x slots of the group / E, rounded up."""
    minimum: int
    """Slots that an expert always has."""
    group_size: int
    """Consecutive tokens that share a capacity; the last group may have fewer."""
    policy: Literal["position", "score"]
    """Who goes first: "position" all first choices in the order of the tokens, then all second
    ones; "score" the largest gates, ties by token and choice."""
    slots: Literal["used", "all"] = "used"
    """Which slots are counted: those that are used, or all K of each token that uses any."""

    def num_places(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """Return the most slots of an expert that are served, where each token uses `top_k`."""
        size = max(1, min(self.group_size, num_tokens))
        capacity = max(self.minimum, math.ceil(self.factor * (size * top_k) / num_experts))
        return min(-(-num_tokens // size) * capacity, num_tokens)


def keep_slots(
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    rule: CapacityRule,
    *,
    by_triton: bool = False,
) -> Tensor:
    """Return (T, K) int64 expert ids, -1 for the slots that are unused or not served.

    Args:
        expert_ids_TK: int64, -1 where a slot is unused.
        weights_TK: gates, which order the slots under "score".
        num_experts: E.
        rule: who is served.
        by_triton: count positions by the kernels instead of a sort.
    """
    num_tokens, top_k = expert_ids_TK.shape
    if not expert_ids_TK.numel():
        return expert_ids_TK
    size = min(rule.group_size, num_tokens)
    # Whole groups: tokens past the last have unused slots.
    ids_TK = F.pad(expert_ids_TK, (0, 0, 0, -num_tokens % size), value=-1)
    ids_GS = ids_TK.view(-1, size * top_k)
    used_GTK = ids_GS.view(-1, size, top_k) >= 0
    if rule.slots == "all":
        used_GTK = used_GTK.any(2, keepdim=True).expand_as(used_GTK)
    num_slots_G = used_GTK.sum((1, 2))
    capacity_G = (rule.factor * num_slots_G.double() / num_experts).ceil().clamp(min=rule.minimum)
    if rule.policy == "score":
        gates_TK = weights_TK.masked_fill(expert_ids_TK < 0, -torch.inf)
        gates_TK = F.pad(gates_TK, (0, 0, 0, -num_tokens % size), value=-torch.inf)
        order_GS = gates_TK.view_as(ids_GS).argsort(dim=1, descending=True, stable=True)
    else:
        slots = torch.arange(ids_GS.shape[1], device=ids_GS.device)
        order_GS = slots.view(size, top_k).t().flatten().expand_as(ids_GS)
    ordered_GS = ids_GS.gather(1, order_GS)
    if by_triton:
        from dmoe_kernels.capacity import positions

        position_GS = positions(ordered_GS, num_experts)
    else:
        position_GS = positions_torch(ordered_GS, num_experts)
    kept_GS = ordered_GS.where(position_GS < capacity_G[:, None], -1)
    return torch.empty_like(ids_GS).scatter_(1, order_GS, kept_GS).view_as(ids_TK)[:num_tokens]


def positions_torch(ids_GS: Tensor, num_experts: int) -> Tensor:
    """Return (G, S) int64: how many slots of the group go before each and have the same expert.

    Unused slots (-1) have positions among themselves.
    """
    bins_GS = ids_GS.where(ids_GS >= 0, num_experts)
    sorted_GS, order_GS = bins_GS.sort(dim=1, stable=True)
    starts_GS = torch.searchsorted(sorted_GS, sorted_GS)
    place_S = torch.arange(ids_GS.shape[1], device=ids_GS.device)
    return torch.empty_like(order_GS).scatter_(1, order_GS, place_S - starts_GS)


def keep_slots_loop(
    expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int, rule: CapacityRule
) -> Tensor:
    """Define `keep_slots`, one slot at a time."""
    ids_TK = expert_ids_TK.clone()
    num_tokens, top_k = ids_TK.shape
    for start in range(0, num_tokens, rule.group_size):
        tokens = range(start, min(start + rule.group_size, num_tokens))
        slots = [(t, k) for k in range(top_k) for t in tokens if ids_TK[t, k] >= 0]
        counted = len(slots)
        if rule.slots == "all":
            counted = top_k * len({t for t, _ in slots})
        wanted = rule.factor * counted / num_experts
        capacity = max(rule.minimum, -int(-wanted // 1))
        if rule.policy == "score":
            slots = sorted(sorted(slots), key=lambda slot: weights_TK[slot].item(), reverse=True)
        served = [0] * num_experts
        for slot in slots:
            expert = int(ids_TK[slot])
            if served[expert] == capacity:
                ids_TK[slot] = -1
            else:
                served[expert] += 1
    return ids_TK
