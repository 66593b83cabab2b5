"""Routing: scores, selection of the k best experts, their gates, and the gradient of the logits.

Selection and gates are two launches, as a selection is made once and gates are computed again where
activations are. Gates are divided to nearest: a GPU's own division is not, and a gate that is the
only one would not be 1. Shapes: T tokens, E experts, K slots per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import ordered

TINY = tl.constexpr(1e-20)
"""What a sum of scores is at least, as in the torch twin."""


def select(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    k_T: Tensor | None,
    valid_T: Tensor | None,
    *,
    top_k: int,
    score: str,
) -> Tensor:
    """Return (T, K) int64 ids of the largest score + bias, largest first, ties by lowest id.

    Args:
        logits_TE: float32.
        bias_E: float32, added to scores for the choice alone, or None.
        k_T: (T,) int64 experts of each token, at most `top_k`, or None for `top_k`.
        valid_T: (T,) bool, False for padding, which gets none, or None.
        top_k: K, at most E.
        score: "softmax" or "sigmoid".
    """
    num_tokens, num_experts = logits_TE.shape
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    if ids_TK.numel():
        block_t, block_e = blocks(num_experts)
        select_kernel[(triton.cdiv(num_tokens, block_t),)](
            logits_TE.contiguous(),
            logits_TE if bias_E is None else bias_E,
            ids_TK if k_T is None else k_T,
            ids_TK if valid_T is None else valid_T.view(torch.uint8),
            ids_TK,
            num_tokens,
            num_experts,
            top_k,
            SCORE=score,
            HAS_BIAS=bias_E is not None,
            HAS_K=k_T is not None,
            HAS_VALID=valid_T is not None,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
        )
    return ids_TK


def weigh(
    logits_TE: Tensor,
    ids_TK: Tensor,
    *,
    score: str,
    over_choice: bool,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (T, E) probabilities, rows summing to 1, and (T, K) gates, 0 in unused slots.

    Args:
        logits_TE: float32.
        ids_TK: int64, -1 where a slot is unused.
        score: "softmax" or "sigmoid".
        over_choice: take the softmax over a token's chosen logits.
        normalize: divide a token's gates by their sum.
        scale: multiplies the gates.
    """
    num_tokens, num_experts = logits_TE.shape
    scores_TE, weights_TK = torch.empty_like(logits_TE), logits_TE.new_empty(ids_TK.shape)
    if num_tokens:
        block_t, block_e = blocks(num_experts)
        weigh_kernel[(triton.cdiv(num_tokens, block_t),)](
            logits_TE,
            ids_TK,
            scores_TE,
            weights_TK,
            num_tokens,
            num_experts,
            ids_TK.shape[1],
            scale,
            SCORE=score,
            OVER_CHOICE=over_choice,
            NORMALIZE=normalize,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(max(1, ids_TK.shape[1])),
        )
    return scores_TE, weights_TK


def weigh_backward(
    logits_TE: Tensor,
    ids_TK: Tensor,
    dscores_TE: Tensor | None,
    dweights_TK: Tensor | None,
    *,
    score: str,
    over_choice: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Return the gradient of the logits from those of what `weigh` returned, None for zero."""
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE)
    if num_tokens:
        block_t, block_e = blocks(num_experts)
        weigh_backward_kernel[(triton.cdiv(num_tokens, block_t),)](
            logits_TE,
            ids_TK,
            logits_TE if dscores_TE is None else dscores_TE,
            logits_TE if dweights_TK is None else dweights_TK,
            dlogits_TE,
            num_tokens,
            num_experts,
            ids_TK.shape[1],
            scale,
            SCORE=score,
            OVER_CHOICE=over_choice,
            NORMALIZE=normalize,
            HAS_DSCORES=dscores_TE is not None,
            HAS_DWEIGHTS=dweights_TK is not None,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(max(1, ids_TK.shape[1])),
        )
    return dlogits_TE


def blocks(num_experts: int) -> tuple[int, int]:
    """Return the tokens and the experts that a program has in registers."""
    block_e = triton.next_power_of_2(num_experts)
    return max(1, min(32, 2048 // block_e)), block_e


@triton.jit
def scores_of(logits, inside, SCORE: tl.constexpr):
    """Return the (BLOCK_T, BLOCK_E) scores, and for a softmax the maximum and the sum of a row."""
    if SCORE == "softmax":
        largest = tl.max(logits, 1)
        scores = tl.where(inside, tl.exp(logits - largest[:, None]), 0.0)
        total = tl.sum(scores, 1)
        scores = scores / total[:, None]
    else:
        scores = tl.where(inside, tl.sigmoid(logits), 0.0)
        largest = tl.zeros_like(tl.max(logits, 1))
        total = tl.sum(scores, 1)
    return scores, largest, total


@triton.jit
def select_kernel(
    logits,
    bias,
    k_of_token,
    valid,
    ids,
    num_tokens,
    num_experts,
    top_k,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Take the largest key of each token, `top_k` times."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < num_tokens)[:, None] & (e < num_experts)[None, :]
    place = t.to(tl.int64)[:, None] * num_experts + e[None, :]
    scores, _, _ = scores_of(
        tl.load(logits + place, mask=inside, other=float("-inf")), inside, SCORE
    )
    if HAS_BIAS:
        scores += tl.load(bias + e, mask=e < num_experts, other=0.0)[None, :]
    # A float and an index in one integer that orders as (score descending, index ascending).
    keys = (ordered(scores).to(tl.int64) << 32) + (num_experts - 1 - e)[None, :]
    LEAST: tl.constexpr = -(2**63)
    keys = tl.where(inside, keys, LEAST)
    num_slots = tl.zeros((BLOCK_T,), tl.int64) + top_k
    if HAS_K:
        num_slots = tl.load(k_of_token + t, mask=t < num_tokens, other=0)
    if HAS_VALID:
        num_slots = tl.where(tl.load(valid + t, mask=t < num_tokens, other=0) != 0, num_slots, 0)
    for j in range(0, top_k):
        best = tl.max(keys, 1)
        expert = num_experts - 1 - (best & 0xFFFFFFFF)
        expert = tl.where(num_slots > j, expert, -1)
        tl.store(ids + t.to(tl.int64) * top_k + j, expert, mask=t < num_tokens)
        keys = tl.where(keys == best[:, None], LEAST, keys)


@triton.jit
def raw_gates(
    logits,
    ids,
    t,
    largest,
    total,
    num_tokens,
    num_experts,
    top_k,
    SCORE: tl.constexpr,
    OVER_CHOICE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return (BLOCK_T, BLOCK_K) gates before they are normalised, and which slots are used."""
    j = tl.arange(0, BLOCK_K)
    inside = (t < num_tokens)[:, None] & (j < top_k)[None, :]
    expert = tl.load(ids + t.to(tl.int64)[:, None] * top_k + j[None, :], mask=inside, other=-1)
    used = expert >= 0
    chosen = tl.load(logits + t.to(tl.int64)[:, None] * num_experts + expert, mask=used, other=0.0)
    if OVER_CHOICE:
        # Finite, as a token without experts would else divide 0 by 0.
        best = tl.max(tl.where(used, chosen, -1e30), 1)
        gates = tl.where(used, tl.exp(chosen - best[:, None]), 0.0)
        gates = tl.math.div_rn(gates, tl.maximum(tl.sum(gates, 1), TINY)[:, None])
    elif SCORE == "softmax":
        gates = tl.math.div_rn(tl.exp(chosen - largest[:, None]), total[:, None])
        gates = tl.where(used, gates, 0.0)
    else:
        gates = tl.where(used, tl.sigmoid(chosen), 0.0)
    return gates, used


@triton.jit
def weigh_kernel(
    logits,
    ids,
    scores_out,
    weights,
    num_tokens,
    num_experts,
    top_k,
    scale,
    SCORE: tl.constexpr,
    OVER_CHOICE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the probabilities and the gates of a block of tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < num_tokens)[:, None] & (e < num_experts)[None, :]
    place = t.to(tl.int64)[:, None] * num_experts + e[None, :]
    scores, largest, total = scores_of(
        tl.load(logits + place, mask=inside, other=float("-inf")), inside, SCORE
    )
    if SCORE == "sigmoid":
        scores = scores / tl.maximum(total, TINY)[:, None]
    tl.store(scores_out + place, scores, mask=inside)
    gates, _ = raw_gates(
        logits,
        ids,
        t,
        largest,
        total,
        num_tokens,
        num_experts,
        top_k,
        SCORE,
        OVER_CHOICE,
        BLOCK_K,
    )
    if NORMALIZE:
        gates = tl.math.div_rn(gates, tl.maximum(tl.sum(gates, 1), TINY)[:, None])
    j = tl.arange(0, BLOCK_K)
    slot = t.to(tl.int64)[:, None] * top_k + j[None, :]
    tl.store(weights + slot, gates * scale, mask=(t < num_tokens)[:, None] & (j < top_k)[None, :])


@triton.jit
def weigh_backward_kernel(
    logits,
    ids,
    dscores,
    dweights,
    dlogits,
    num_tokens,
    num_experts,
    top_k,
    scale,
    SCORE: tl.constexpr,
    OVER_CHOICE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_DSCORES: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the gradient of the logits of a block of tokens; scores are computed again."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < num_tokens)[:, None] & (e < num_experts)[None, :]
    place = t.to(tl.int64)[:, None] * num_experts + e[None, :]
    scores, largest, total = scores_of(
        tl.load(logits + place, mask=inside, other=float("-inf")), inside, SCORE
    )
    dscore = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_DSCORES:
        dscore = tl.load(dscores + place, mask=inside, other=0.0)
        if SCORE == "sigmoid":
            total = tl.maximum(total, TINY)
            share = tl.sum(dscore * scores, 1) / total
            dscore = tl.where(inside, (dscore - share[:, None]) / total[:, None], 0.0)
    direct = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_DWEIGHTS:
        dgates = _dgates(
            logits,
            ids,
            dweights,
            t,
            largest,
            total,
            num_tokens,
            num_experts,
            top_k,
            scale,
            SCORE,
            OVER_CHOICE,
            NORMALIZE,
            BLOCK_K,
        )
        column = tl.arange(0, BLOCK_K)
        for j in range(0, top_k):
            dgate = tl.sum(tl.where(column[None, :] == j, dgates, 0.0), 1)
            expert = tl.load(ids + t.to(tl.int64) * top_k + j, mask=t < num_tokens, other=-1)
            part = tl.where(e[None, :] == expert[:, None], dgate[:, None], 0.0)
            if OVER_CHOICE:
                direct += part
            else:
                dscore += part
    if SCORE == "softmax":
        dlogit = scores * (dscore - tl.sum(scores * dscore, 1)[:, None])
    else:
        dlogit = dscore * scores * (1 - scores)
    tl.store(dlogits + place, dlogit + direct, mask=inside)


@triton.jit
def _dgates(
    logits,
    ids,
    dweights,
    t,
    largest,
    total,
    num_tokens,
    num_experts,
    top_k,
    scale,
    SCORE: tl.constexpr,
    OVER_CHOICE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the gradient of each slot's score, or with OVER_CHOICE of its logit."""
    gates, used = raw_gates(
        logits,
        ids,
        t,
        largest,
        total,
        num_tokens,
        num_experts,
        top_k,
        SCORE,
        OVER_CHOICE,
        BLOCK_K,
    )
    j = tl.arange(0, BLOCK_K)
    slot = t.to(tl.int64)[:, None] * top_k + j[None, :]
    dgates = tl.load(dweights + slot, mask=used, other=0.0) * scale
    if NORMALIZE:
        sums = tl.maximum(tl.sum(gates, 1), TINY)[:, None]
        quotient = tl.math.div_rn(gates, sums)
        dgates = (dgates - tl.sum(dgates * quotient, 1)[:, None]) / sums
    if OVER_CHOICE:
        dgates = gates * (dgates - tl.sum(gates * dgates, 1)[:, None])
    return tl.where(used, dgates, 0.0)
