"""How a token's experts are chosen once there are scores, and how gates are normalised.

Shapes: T tokens, E experts, K slots per token, P experts that a token draws from.
"""

from typing import Any

import torch
from torch import Tensor

from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.ops import top_k_ids
from dmoe.rng import stream_key, token_uniform


def top_k_routing(logits_TE: Tensor, scores_TE: Tensor, k: int, context: MoEContext) -> Routing:
    """Route each token to its k best experts, with their scores as gates: a plain router.

    Args:
        logits_TE: (T, E) router output.
        scores_TE: (T, E) what is made of it, rows summing to 1.
        k: experts of every token, where the context does not say.
        context: of the pass.
    """
    ids_TK = context.decide(
        "expert_ids", lambda: choose(scores_TE, scores_TE, context.k_or(k), context)
    )
    return make_routing(logits_TE, scores_TE, ids_TK, scores_of(ids_TK, scores_TE))


def choose(keys_TE: Tensor, scores_TE: Tensor, k: int | Tensor, context: MoEContext) -> Tensor:
    """Return the experts of the largest keys of each token, largest first.

    Args:
        keys_TE: (T, E) what is compared; ties go to the lowest id.
        scores_TE: (T, E) scores, for the gate threshold.
        k: experts of every token, or (T,) int64 of each; at most E.
        context: tells padding, which gets none, and what else changes the choice.

    Returns:
        (T, K) int64 ids, -1 in slots that a token does not use; K is the largest k.
    """
    if context.k_ideal is None:
        ids_TK = top_k_ids(keys_TE, most_slots(k))
    else:
        ids_TK = random_subset(top_k_ids(keys_TE, context.k_ideal), k, context)
    if isinstance(k, Tensor):
        place_K = torch.arange(ids_TK.shape[1], device=ids_TK.device)
        ids_TK = ids_TK.masked_fill(place_K >= k[:, None], -1)
    if context.gate_threshold:
        ids_TK = without_small(ids_TK, scores_TE, context.gate_threshold)
    if context.valid_T is None:
        return ids_TK
    return ids_TK.masked_fill(~context.valid_T[:, None], -1)


def most_slots(k: int | Tensor) -> int:
    """Return the largest of the tokens' numbers of experts."""
    if isinstance(k, int):
        return k
    return int(k.max()) if len(k) else 0


def slots_of(used_TE: Tensor, num_slots: int | None = None) -> Tensor:
    """Return (T, K) int64: the ids of the experts that are used, the lowest first, then -1.

    Args:
        used_TE: (T, E) bool.
        num_slots: K, no less than any token uses; None for the most that one does.
    """
    if num_slots is None:
        num_slots = int(used_TE.sum(1).max()) if len(used_TE) else 0
    ids_TK = top_k_ids(used_TE.float(), num_slots)
    return ids_TK.masked_fill(~used_TE.gather(1, ids_TK), -1)


def random_subset(pool_TP: Tensor, k: int | Tensor, context: MoEContext) -> Tensor:
    """Return k random members of each token's pool, in the order of the pool.

    Stochastic co-activation of EMoE (arXiv 2509.21892): each subset of k is equally likely.

    Args:
        pool_TP: (T, P) int64 ids, best first.
        k: members for every token, or (T,) int64 for each; at most P.
        context: has what the draw is a function of, beside the token.

    Returns:
        (T, K) int64 ids; a token's places beyond its k hold ids without meaning.
    """
    assert context.token_ids_T is not None, "random routing needs the tokens' numbers"
    key = stream_key(context.seed, "co_activation", context.step, context.layer)
    draws_TP = token_uniform(key, context.token_ids_T, pool_TP.shape[1])
    # The places of the k smallest draws, in order.
    places_TK = draws_TP.argsort(dim=1, stable=True)[:, : most_slots(k)]
    if isinstance(k, Tensor):
        order_K = torch.arange(places_TK.shape[1], device=k.device)
        places_TK = places_TK.masked_fill(order_K >= k[:, None], pool_TP.shape[1] - 1)
    return pool_TP.gather(1, places_TK.sort(dim=1).values)


def without_random_second(ids_TK: Tensor, gates_TK: Tensor, context: MoEContext) -> Tensor:
    """Keep a token's second expert with probability min(1, 2 g), g its gate.

    GShard, arXiv 2006.16668, section 2.2: an expert that hardly weighs is often not worth sending
    to. The first expert keeps the gate it has beside the second.

    Args:
        ids_TK: (T, 2) int64 ids.
        gates_TK: (T, 2) gates that sum to 1.
        context: has what the draw is a function of, beside the token.
    """
    assert context.token_ids_T is not None, "random routing needs the tokens' numbers"
    key = stream_key(context.seed, "second_choice", context.step, context.layer)
    draws_T = token_uniform(key, context.token_ids_T, 1)[:, 0]
    is_dropped_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    is_dropped_TK[:, 1] = draws_T >= 2 * gates_TK[:, 1]
    return ids_TK.masked_fill(is_dropped_TK, -1)


def without_small(ids_TK: Tensor, scores_TE: Tensor, threshold: float) -> Tensor:
    """Free the slots whose score is below `threshold` times the token's largest chosen one.

    Expert skipping of NAEE (arXiv 2402.14800), for any number of experts.
    """
    if not ids_TK.shape[1]:  # no token has any
        return ids_TK
    scores_TK = scores_of(ids_TK, scores_TE)
    largest_T1 = scores_TK.amax(dim=1, keepdim=True)
    return ids_TK.masked_fill(scores_TK < threshold * largest_T1, -1)


def scores_of(ids_TK: Tensor, scores_TE: Tensor) -> Tensor:
    """Return (T, K) the scores of the chosen experts, 0 in unused slots."""
    return scores_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0)


def softmax_over_choice(ids_TK: Tensor, logits_TE: Tensor) -> Tensor:
    """Return (T, K) the softmax of a token's chosen logits, 0 in unused slots."""
    # Finite, as a token without experts would else divide 0 by 0.
    logits_TK = logits_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, -1e30)
    return logits_TK.softmax(-1).masked_fill(ids_TK < 0, 0)


def divided_by_sum(scores: Tensor) -> Tensor:
    """Divide each row by its sum; the gradient of a row with one score above 0 is exactly 0."""
    quotient: Tensor = _DividedBySum.apply(scores)
    return quotient


class _DividedBySum(torch.autograd.Function):
    # By autograd's own rules the gradient of s / s would be a rounding error, and AdamW, which
    # divides gradients by their size, would make steps of it as large as any.

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        # Sigmoid scores may all vanish; this keeps 0 / 0 out, and infinity out of the gradient.
        total = scores.sum(-1, keepdim=True).clamp(min=1e-20)
        quotient = scores / total
        ctx.save_for_backward(quotient, total)
        return quotient

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        quotient, total = ctx.saved_tensors
        return (gradient - (gradient * quotient).sum(-1, keepdim=True)) / total
