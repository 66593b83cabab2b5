"""Infinity-MoE over neurons: the masks of all samples, and the activation under their mean.

A product writes the scores W_z z of some tokens, rounded as float32, to scratch memory; then a
program a token searches the n-th largest score of each of its samples in registers, writes a bit a
neuron, and multiplies the activation by the mean mask. Where the bits are known already, scores are
computed again, a tile at a time, and never written. Shapes: T tokens, C tokens of a piece, K
samples, Z latent dim, F neurons, H = 2F if gated, else F.
"""

from collections.abc import Iterator
from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import dot, gelu_tanh, rounded

SCRATCH_BYTES = 2**27
"""Most memory of the scores, or of their gradients, that exist at a time."""

PRECISION = "ieee" if torch.version.hip else "tf32x3"
"""Of scores: that of float32, for which NVIDIA's tensor cores take three products of TF32."""

SCORES = {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_Z": 32, "num_warps": 8, "num_stages": 2}
TILE = {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_Z": 32, "num_warps": 8, "num_stages": 1}
"""Tiles of the two kinds of products, which fit the registers of every target."""


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
    for tokens, scores_CKF in _scores(z_TKZ, w_FZ):
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
    for tokens, scores_CKF in _scores(z_TKZ, w_FZ):
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


def masked_activation(
    hidden_TH: Tensor,
    bits: Tensor,
    z_TKZ: Tensor,
    w_FZ: Tensor,
    activation: str,
    *,
    hard: bool,
    scale: float,
) -> Tensor:
    """Return (T, F): act(hidden) times scale / K x sum_k m_k, in the dtype of `hidden_TH`.

    Args:
        hidden_TH: gates, then ups, for "swiglu"; contiguous.
        bits: (T, K, F / 8) of `latent_masks`.
        z_TKZ: float32 samples.
        w_FZ: float32.
        activation: "swiglu", "gelu" (tanh form) or "relu".
        hard: m_k is 1 at the chosen neurons; else it is their score.
        scale: a constant factor.
    """
    a_TF = hidden_TH.new_empty(len(hidden_TH), len(w_FZ))
    _launch(forward_kernel, hidden_TH, bits, z_TKZ, w_FZ, [a_TF], activation, hard, scale)
    return a_TF


def masked_activation_backward(
    da_TF: Tensor,
    hidden_TH: Tensor,
    bits: Tensor,
    z_TKZ: Tensor,
    w_FZ: Tensor,
    activation: str,
    *,
    hard: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden_TH, dz_TKZ and dw_FZ; a hard mask has the gradient of a soft one."""
    z_TKZ = z_TKZ.contiguous()
    dhidden_TH, dz_TKZ = torch.empty_like(hidden_TH), torch.empty_like(z_TKZ)
    dw_FZ = torch.zeros_like(w_FZ)
    for tokens, dscores_CKF in _pieces(z_TKZ, w_FZ):
        tensors = [da_TF[tokens], dhidden_TH[tokens], dscores_CKF]
        part = hidden_TH[tokens], bits[tokens], z_TKZ[tokens]
        _launch(backward_kernel, *part, w_FZ, tensors, activation, hard, scale)
        dscores_RF = dscores_CKF.flatten(0, 1)
        torch.mm(dscores_RF, w_FZ, out=dz_TKZ[tokens].flatten(0, 1))
        dw_FZ.addmm_(dscores_RF.t(), z_TKZ[tokens].flatten(0, 1))
    return dhidden_TH, dz_TKZ, dw_FZ


def latent_scores(z_TKZ: Tensor, w_FZ: Tensor) -> Tensor:
    """Return (T, K, F) float32, the scores that `latent_masks` compares, all at once."""
    scores_TKF = w_FZ.new_empty(*z_TKZ.shape[:2], len(w_FZ))
    for tokens, scores_CKF in _scores(z_TKZ, w_FZ):
        scores_TKF[tokens] = scores_CKF
    return scores_TKF


def _empty_bits(z_TKZ: Tensor, w_FZ: Tensor) -> Tensor:
    shape = *z_TKZ.shape[:2], len(w_FZ) // 8
    return torch.empty(shape, dtype=torch.uint8, device=z_TKZ.device)


def _pieces(z_TKZ: Tensor, w_FZ: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens of each piece, and (C, K, F) float32 memory, the same for all."""
    num_tokens, samples, width = *z_TKZ.shape[:2], len(w_FZ)
    size = max(1, SCRATCH_BYTES // (4 * 64 * samples * width)) * 64
    scratch = w_FZ.new_empty(min(size, num_tokens), samples, width)
    for start in range(0, num_tokens, size):
        tokens = slice(start, min(start + size, num_tokens))
        yield tokens, scratch[: tokens.stop - start]


def _scores(z_TKZ: Tensor, w_FZ: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens of each piece and their scores, which the next piece overwrites."""
    (_, samples, latent_dim), width = z_TKZ.shape, len(w_FZ)
    z_TKZ, w_FZ = z_TKZ.contiguous(), w_FZ.contiguous()
    for tokens, scores_CKF in _pieces(z_TKZ, w_FZ):
        num_rows = len(scores_CKF) * samples
        grid = (
            triton.cdiv(width, SCORES["BLOCK_F"]),
            triton.cdiv(num_rows, SCORES["BLOCK_R"]),
        )
        scores_kernel[grid](
            z_TKZ[tokens],
            w_FZ,
            scores_CKF,
            num_rows,
            width,
            latent_dim,
            PRECISION=PRECISION,
            **SCORES,
        )
        yield tokens, scores_CKF


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
    block = max(16, triton.next_power_of_2(width) // 4)
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
        width=width,
        PARTS=triton.cdiv(width, block),
        BLOCK_F=block,
        num_warps=8 if width > 4096 else 4,
    )


def _launch(kernel, hidden_TH, bits, z_TKZ, w_FZ, tensors, activation, hard, scale) -> None:
    (num_tokens, samples, latent_dim), width = z_TKZ.shape, len(w_FZ)
    if num_tokens:
        grid = (triton.cdiv(width, TILE["BLOCK_F"]), triton.cdiv(num_tokens, TILE["BLOCK_T"]))
        kernel[grid](
            hidden_TH,
            bits,
            z_TKZ.contiguous(),
            w_FZ.contiguous(),
            *tensors,
            num_tokens,
            width,
            samples,
            latent_dim,
            scale / samples,
            ACTIVATION=activation,
            HARD=hard,
            PRECISION=PRECISION,
            **TILE,
        )


@triton.jit
def ordered(x):
    """Return integers that order as the floats do, with -0.0 equal to 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return ((bits >> 31) & 0x7FFFFFFF) ^ bits


@triton.jit
def float_of(key):
    """Undo `ordered`."""
    return (((key >> 31) & 0x7FFFFFFF) ^ key).to(tl.float32, bitcast=True)


@triton.jit
def product_tile(
    z,
    w,
    rows,
    rows_inside,
    f,
    width,
    latent_dim,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Return the scores of neurons `f` at some rows of z; each is the same in any tile."""
    score = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for first in range(0, latent_dim, BLOCK_Z):
        i = first + tl.arange(0, BLOCK_Z)
        z_mask = rows_inside[:, None] & (i < latent_dim)[None, :]
        z_tile = tl.load(z + rows[:, None] * latent_dim + i[None, :], mask=z_mask, other=0.0)
        w_mask = (i < latent_dim)[:, None] & (f < width)[None, :]
        w_tile = tl.load(w + f[None, :] * latent_dim + i[:, None], mask=w_mask, other=0.0)
        score = dot(z_tile, w_tile, score, PRECISION)
    return score


@triton.jit
def scores_kernel(
    z,
    w,
    scores,
    num_rows,
    width,
    latent_dim,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Write the scores of a block of rows and neurons."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < num_rows
    score = product_tile(
        z, w, rows, inside, f, width, latent_dim, PRECISION, BLOCK_R, BLOCK_F, BLOCK_Z
    )
    place = scores + rows[:, None] * width + f[None, :]
    tl.store(place, score, mask=inside[:, None] & (f < width)[None, :])


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


@triton.jit
def activated(hidden, rows, f, inside, width, ACTIVATION: tl.constexpr):
    """Return the activation of neurons `f` at some rows, in float32."""
    if ACTIVATION == "swiglu":
        place = hidden + rows * (2 * width) + f
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        up_ = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
        act = gate * tl.sigmoid(gate) * up_
    else:
        pre = tl.load(hidden + rows * width + f, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "gelu":
            act, _ = gelu_tanh(pre)
        else:
            act = tl.maximum(pre, 0.0)
    return act


@triton.jit
def bits_tile(bits, row, num_tokens_inside, width, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return this program's columns of some rows of masks, as floats; a byte is loaded once."""
    byte = tl.program_id(0) * (BLOCK_F // 8) + tl.arange(0, BLOCK_F // 8)
    inside = num_tokens_inside[:, None] & (byte < width // 8)[None, :]
    packed = tl.load(bits + row[:, None] * (width // 8) + byte[None, :], mask=inside, other=0)
    eight = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eight, (BLOCK_T, BLOCK_F)).to(tl.float32)


@triton.jit
def mean_tile(
    bits,
    z,
    w,
    t,
    f,
    num_tokens,
    width,
    samples,
    latent_dim,
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Return the sum of the masks of a tile; scores are computed again where masks are soft."""
    inside = t < num_tokens
    total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for k in range(0, samples):
        row = t.to(tl.int64) * samples + k
        chosen = bits_tile(bits, row, inside, width, BLOCK_T, BLOCK_F)
        if HARD:
            total += chosen
        else:
            total += chosen * product_tile(
                z, w, row, inside, f, width, latent_dim, PRECISION, BLOCK_T, BLOCK_F, BLOCK_Z
            )
    return total


@triton.jit
def forward_kernel(
    hidden,
    bits,
    z,
    w,
    a,
    num_tokens,
    width,
    samples,
    latent_dim,
    factor,
    ACTIVATION: tl.constexpr,
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Write the activation of a block of tokens and neurons under masks that are known."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = mean_tile(
        bits,
        z,
        w,
        t,
        f,
        num_tokens,
        width,
        samples,
        latent_dim,
        HARD,
        PRECISION,
        BLOCK_T,
        BLOCK_F,
        BLOCK_Z,
    )
    inside = (t < num_tokens)[:, None] & (f < width)[None, :]
    rows = t.to(tl.int64)[:, None]
    act = activated(hidden, rows, f[None, :], inside, width, ACTIVATION)
    out = rounded(act * (total * factor), a.dtype.element_ty)
    tl.store(a + rows * width + f[None, :], out, mask=inside)


@triton.jit
def backward_kernel(
    hidden,
    bits,
    z,
    w,
    da,
    dhidden,
    dscores,
    num_tokens,
    width,
    samples,
    latent_dim,
    factor,
    ACTIVATION: tl.constexpr,
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Write the gradients of the pre-activation and of the scores of each sample."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = mean_tile(
        bits,
        z,
        w,
        t,
        f,
        num_tokens,
        width,
        samples,
        latent_dim,
        HARD,
        PRECISION,
        BLOCK_T,
        BLOCK_F,
        BLOCK_Z,
    )
    inside = (t < num_tokens)[:, None] & (f < width)[None, :]
    rows = t.to(tl.int64)[:, None]
    flat = rows * width + f[None, :]
    dtype: tl.constexpr = dhidden.dtype.element_ty
    gradient = tl.load(da + flat, mask=inside, other=0.0).to(tl.float32)
    dact = gradient * (total * factor)
    if ACTIVATION == "swiglu":
        place = rows * (2 * width) + f[None, :]
        gate = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        up_ = tl.load(hidden + place + width, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dgate = dact * up_ * (sigmoid + silu * (1 - sigmoid))
        tl.store(dhidden + place, rounded(dgate, dtype), mask=inside)
        tl.store(dhidden + place + width, rounded(dact * silu, dtype), mask=inside)
        act = silu * up_
    else:
        pre = tl.load(hidden + flat, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "gelu":
            act, slope = gelu_tanh(pre)
        else:
            act, slope = tl.maximum(pre, 0.0), tl.where(pre > 0, 1.0, 0.0)
        tl.store(dhidden + flat, rounded(dact * slope, dtype), mask=inside)
    dmean = gradient * act * factor
    for k in range(0, samples):
        row = t.to(tl.int64) * samples + k
        chosen = bits_tile(bits, row, t < num_tokens, width, BLOCK_T, BLOCK_F)
        tl.store(dscores + row[:, None] * width + f[None, :], dmean * chosen, mask=inside)
