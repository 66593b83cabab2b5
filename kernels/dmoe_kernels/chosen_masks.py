"""Infinity-MoE over neurons: masks of all samples are chosen, and applied in the same pass.

A product writes the scores of some tokens to scratch memory. Then a program a token searches the
n-th largest score of each of its samples in registers, writes a bit a neuron, and multiplies the
activation by the mean of the masks. Shapes: T tokens, C tokens of a piece, K samples, Z latent dim,
F neurons, H = 2F if gated, else F.
"""

from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import ordered, rounded
from dmoe_kernels.latent_scores import scores_of_pieces
from dmoe_kernels.mean_mask import activated


def latent_masks(
    z_TKZ: Tensor, w_FZ: Tensor, num_active: int, passes: Tensor | None = None
) -> Tensor:
    """Return (T, K, F / 8) uint8: 1 at the largest scores W_z z of each row, ties to lowest index.

    Args:
        z_TKZ: float32 samples.
        w_FZ: float32, F a multiple of 8.
        num_active: scores that are kept, from 1 to F.
        passes: (T, K) int32 that gets how often a row's scores were counted, or None.
    """
    bits = _empty_bits(z_TKZ, w_FZ)
    for tokens, scores_CKF in scores_of_pieces(z_TKZ, w_FZ):
        counted = None if passes is None else passes[tokens]
        _choose(scores_CKF, num_active, bits[tokens], passes=counted)
    return bits


def chosen_activation(
    hidden_TH: Tensor,
    z_TKZ: Tensor,
    w_FZ: Tensor,
    num_active: int,
    activation: str,
    *,
    hard: bool,
    scale: float,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `masked_activation` does under the bits of `latent_masks`, and these bits.

    Args:
        hidden_TH: as all that follow, as in these two.
        valid_T: bool, False where a token gets empty masks, or None.
    """
    a_TF, bits = hidden_TH.new_empty(len(hidden_TH), len(w_FZ)), _empty_bits(z_TKZ, w_FZ)
    for tokens, scores_CKF in scores_of_pieces(z_TKZ, w_FZ):
        _choose(
            scores_CKF,
            num_active,
            bits[tokens],
            valid_C=None if valid_T is None else valid_T[tokens],
            hidden_CH=hidden_TH[tokens],
            a_CF=a_TF[tokens],
            activation=activation,
            hard=hard,
            scale=scale,
        )
    return a_TF, bits


def _empty_bits(z_TKZ: Tensor, w_FZ: Tensor) -> Tensor:
    shape = *z_TKZ.shape[:2], len(w_FZ) // 8
    return torch.empty(shape, dtype=torch.uint8, device=z_TKZ.device)


def _choose(
    scores_CKF: Tensor,
    num_active: int,
    bits: Tensor,
    *,
    passes: Tensor | None = None,
    valid_C: Tensor | None = None,
    hidden_CH: Tensor | None = None,
    a_CF: Tensor | None = None,
    activation: str = "none",
    hard: bool = True,
    scale: float = 1.0,
) -> None:
    num_tokens, samples, width = scores_CKF.shape
    sizes, warps = blocks(width)
    # The score that a share of a normal distribution is above: where the search begins.
    share = (num_active - 0.5) / width
    choose_kernel[(num_tokens,)](
        scores_CKF,
        bits if valid_C is None else valid_C.view(torch.uint8),
        bits if hidden_CH is None else hidden_CH,
        bits,
        bits if a_CF is None else a_CF,
        bits if passes is None else passes,
        samples,
        num_active,
        NormalDist().inv_cdf(1 - share),
        scale / samples,
        ACTIVATION=activation,
        HARD=hard,
        HAS_VALID=valid_C is not None,
        COUNT_PASSES=passes is not None,
        **sizes,
        num_warps=warps,
    )


def blocks(width: int) -> tuple[dict[str, int], int]:
    """Return the constants for rows of `width` scores, and the warps that hold one."""
    block = max(16, triton.next_power_of_2(width) // 4)
    sizes = {"width": width, "PARTS": triton.cdiv(width, block), "BLOCK_F": block}
    return sizes, min(16, max(1, block // 256))


@triton.jit
def float_of(key):
    """Undo `ordered`."""
    return (((key >> 31) & 0x7FFFFFFF) ^ key).to(tl.float32, bitcast=True)


@triton.jit
def count_above(keys, key, PARTS: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return how many keys are above `key`.

    Sums of `key`, or of one more, may overflow, and what is left of them is right all the same. A
    sum of comparisons would make LLVM gather bits to count these, which takes more instructions.
    """
    reach = tl.zeros((BLOCK_F,), tl.int32)
    for p in tl.static_range(PARTS):
        reach += tl.where(keys[p] > key, key + 1, key)
    for _ in tl.static_range(PARTS):
        reach -= key
    return tl.sum(reach)


@triton.jit
def count_equal(keys, key, last, PARTS: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return how many keys up to the place `last` are `key`."""
    f = tl.arange(0, BLOCK_F)
    reach = tl.zeros((BLOCK_F,), tl.int32)
    for p in tl.static_range(PARTS):
        reach += ((keys[p] == key) & (p * BLOCK_F + f <= last)).to(tl.int32)
    return tl.sum(reach)


@triton.jit
def search(keys, num_active, quantile, width, PARTS: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return the least chosen key of a row, the last chosen place that has it, and the passes.

    The search counts the keys above a guess. The first guess is the quantile of a normal
    distribution; then the count is taken as linear between the nearest guesses on both sides
    (regula falsi in the Illinois form: the side that stays counts for half). Every eighth step
    halves the range of integers between them instead, so that the search ends for any scores; it
    ends early where the count is met. `high` may overflow, and its distance from `low` is right all
    the same, without a sign.
    """
    f = tl.arange(0, BLOCK_F)
    least_key = tl.full((BLOCK_F,), 2**31 - 1, tl.int32)
    most_key = tl.full((BLOCK_F,), -(2**31), tl.int32)
    sums = tl.zeros((BLOCK_F,), tl.float32)
    for p in tl.static_range(PARTS):
        inside = p * BLOCK_F + f < width
        least_key = tl.minimum(least_key, tl.where(inside, keys[p], 2**31 - 1))
        most_key = tl.maximum(most_key, keys[p])
        sums += tl.where(inside, float_of(keys[p]), 0.0)
    low, high = tl.min(least_key), tl.max(most_key) + 1
    mean = tl.sum(sums) / width
    squares = tl.zeros((BLOCK_F,), tl.float32)
    for p in tl.static_range(PARTS):
        off = tl.where(p * BLOCK_F + f < width, float_of(keys[p]) - mean, 0.0)
        squares += off * off
    guess = mean + quantile * tl.sqrt(tl.sum(squares) / width)
    # Sums with a zero are tensors also where the compiler knows a size to be 1.
    reach_low = tl.zeros((), tl.int32) + width
    weight_low = tl.zeros((), tl.float32) + (width - num_active) + 0.5
    weight_high = tl.zeros((), tl.float32) + num_active - 0.5
    was_enough = low != low
    step = tl.zeros((), tl.int32)
    while (reach_low != num_active) & ((high - low).to(tl.uint32, bitcast=True) > 1):
        if step % 8 == 7:
            middle = low + ((high - low).to(tl.uint32, bitcast=True) >> 1).to(
                tl.int32, bitcast=True
            )
        else:
            middle = tl.minimum(tl.maximum(ordered(guess), low + 1), high - 1)
        reach = count_above(keys, middle - 1, PARTS, BLOCK_F)
        enough = reach >= num_active
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        reach_low = tl.where(enough, reach, reach_low)
        share = tl.where((step > 0) & (enough == was_enough), 0.5, 1.0)
        excess = (reach - num_active).to(tl.float32)
        weight_low = tl.where(enough, excess + 0.5, weight_low * share)
        weight_high = tl.where(enough, weight_high * share, 0.5 - excess)
        was_enough = enough
        below, above = float_of(low), float_of(high - 1)
        guess = below + (above - below) * weight_low / (weight_low + weight_high)
        step += 1
    last = tl.zeros((), tl.int32) + width - 1
    if reach_low != num_active:
        # More are equal to the least than are chosen: the first ones are.
        needed = num_active - count_above(keys, low, PARTS, BLOCK_F)
        before = tl.full((), -1, tl.int32)
        while last - before > 1:
            middle = (before + last) >> 1
            enough = count_equal(keys, low, middle, PARTS, BLOCK_F) >= needed
            before, last = tl.where(enough, before, middle), tl.where(enough, middle, last)
    return low, last, step


@triton.jit
def choose_kernel(
    scores,
    valid,
    hidden,
    bits,
    a,
    passes,
    samples,
    num_active,
    quantile,
    factor,
    ACTIVATION: tl.constexpr,
    HARD: tl.constexpr,
    HAS_VALID: tl.constexpr,
    COUNT_PASSES: tl.constexpr,
    width: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Choose the masks of a token's samples, and write its activation under their mean.

    A row is PARTS blocks of registers, whose sizes are powers of two.
    """
    token = tl.program_id(0)
    f = tl.arange(0, BLOCK_F)
    b = tl.arange(0, BLOCK_F // 8)
    if HAS_VALID:
        is_valid = tl.load(valid + token) != 0
    mean = ()
    for _ in tl.static_range(PARTS):
        mean += (tl.zeros((BLOCK_F,), tl.float32),)
    for k in range(0, samples):
        row = token * samples + k
        keys = ()
        for p in tl.static_range(PARTS):
            inside = p * BLOCK_F + f < width
            score = tl.load(scores + row * width + p * BLOCK_F + f, mask=inside, other=0.0)
            keys += (tl.where(inside, ordered(score), -(2**31)),)
        least, last, step = search(keys, num_active, quantile, width, PARTS, BLOCK_F)
        added = ()
        for p in tl.static_range(PARTS):
            place = p * BLOCK_F + f
            chosen = (keys[p] > least) | ((keys[p] == least) & (place <= last))
            if HAS_VALID:
                chosen &= is_valid
            eight = tl.reshape(chosen.to(tl.int32), (BLOCK_F // 8, 8))
            packed = tl.sum(eight << tl.arange(0, 8)[None, :], 1).to(tl.uint8)
            byte = p * (BLOCK_F // 8) + b
            tl.store(bits + row * (width // 8) + byte, packed, mask=byte < width // 8)
            value = 1.0 if HARD else float_of(keys[p])
            added += (mean[p] + tl.where(chosen, value, 0.0),)
        mean = added
        if COUNT_PASSES:
            tl.store(passes + row, step)
    if ACTIVATION != "none":
        for p in tl.static_range(PARTS):
            place = p * BLOCK_F + f
            inside = place < width
            act = activated(hidden, token, place, inside, width, ACTIVATION)
            out = rounded(act * (mean[p] * factor), a.dtype.element_ty)
            tl.store(a + token * width + place, out, mask=inside)
