"""Infinity-MoE over neurons: the masks of all samples, and the activation under their mean.

`latent_masks` projects each sample into the space of neurons and keeps the n largest scores of a
row, exactly; scores never leave the registers, and a mask is a bit a neuron. `masked_activation`
then makes act(h) times the mean mask in one pass over h. Shapes: T tokens, K samples, Z latent dim,
F neurons, H = 2F if gated, else F.
"""

from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import gelu_tanh, rounded


def latent_masks(
    z_TKZ: Tensor, w_FZ: Tensor, num_active: int, passes: Tensor | None = None
) -> Tensor:
    """Return (T, K, F / 8) uint8: 1 at the largest scores W_z z of each row, ties to lowest index.

    Args:
        z_TKZ: float32 samples.
        w_FZ: float32, F a multiple of 8.
        num_active: scores that are kept, from 1 to F.
        passes: (T K,) int32 that gets how often a row's scores were counted, or None.
    """
    (num_tokens, samples, latent_dim), width = z_TKZ.shape, len(w_FZ)
    num_rows = num_tokens * samples
    bits = torch.empty(num_tokens, samples, width // 8, dtype=torch.uint8, device=z_TKZ.device)
    if num_rows:
        # The score that a share of a normal distribution is above: where the search begins.
        share = (num_active - 0.5) / width
        latent_masks_kernel[(num_rows,)](
            z_TKZ.contiguous(),
            w_FZ.t().contiguous(),
            bits,
            bits if passes is None else passes,
            width,
            latent_dim,
            num_active,
            NormalDist().inv_cdf(1 - share),
            COUNT_PASSES=passes is not None,
            BLOCK_F=max(16, triton.next_power_of_2(width)),
            num_warps=8 if width > 1024 else 4,
        )
    return bits


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
) -> tuple[Tensor, Tensor]:
    """Return dhidden_TH, and (T, F) float32 the gradient of the mean mask."""
    dhidden_TH = torch.empty_like(hidden_TH)
    dmean_TF = torch.empty(da_TF.shape, dtype=torch.float32, device=da_TF.device)
    tensors = [da_TF, dhidden_TH, dmean_TF]
    _launch(backward_kernel, hidden_TH, bits, z_TKZ, w_FZ, tensors, activation, hard, scale)
    return dhidden_TH, dmean_TF


def _launch(kernel, hidden_TH, bits, z_TKZ, w_FZ, tensors, activation, hard, scale) -> None:
    (num_tokens, samples, latent_dim), width = z_TKZ.shape, len(w_FZ)
    if num_tokens:
        grid = (triton.cdiv(num_tokens, 16), triton.cdiv(width, 128))
        kernel[grid](
            hidden_TH,
            bits,
            z_TKZ.contiguous(),
            w_FZ.t().contiguous(),
            *tensors,
            num_tokens,
            width,
            samples,
            latent_dim,
            scale / samples,
            ACTIVATION=activation,
            HARD=hard,
            BLOCK_T=16,
            BLOCK_F=128,
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
def latent_masks_kernel(
    z,
    w,
    bits,
    passes,
    width,
    latent_dim,
    num_active,
    quantile,
    COUNT_PASSES: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Search the score of one row that `num_active` scores reach, by counting those above a guess.

    The first guess is the quantile of a normal distribution; then the count is taken as linear
    between the nearest guesses on both sides (regula falsi in the Illinois form: the side that
    stays counts for half). Every eighth step halves the range of integers between them instead, so
    that the search ends for any scores; it ends early where the count is met.
    """
    row = tl.program_id(0)
    f = tl.arange(0, BLOCK_F)
    inside = f < width
    score = tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, latent_dim):
        score += tl.load(z + row * latent_dim + i) * tl.load(
            w + i * width + f, mask=inside, other=0.0
        )
    keys = tl.where(inside, ordered(score), -(2**31))
    low = tl.min(tl.where(inside, keys, 2**31 - 1)).to(tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    # Sums with a zero are tensors also where the compiler knows a size to be 1.
    reach_low = tl.zeros((), tl.int32) + width
    weight_low = tl.zeros((), tl.float32) + (width - num_active) + 0.5
    weight_high = tl.zeros((), tl.float32) + num_active - 0.5
    was_enough = low < low
    mean = tl.sum(score) / width
    deviation = tl.sqrt(tl.sum(tl.where(inside, (score - mean) * (score - mean), 0.0)) / width)
    guess = mean + quantile * deviation
    step = tl.zeros((), tl.int32)
    while (reach_low != num_active) & (high - low > 1):
        if step % 8 == 7:
            middle = low + (high - low) // 2
        else:
            middle = tl.minimum(tl.maximum(ordered(guess).to(tl.int64), low + 1), high - 1)
        reach = tl.sum((inside & (keys >= middle.to(tl.int32))).to(tl.int32))
        enough = reach >= num_active
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        reach_low = tl.where(enough, reach, reach_low)
        share = tl.where((step > 0) & (enough == was_enough), 0.5, 1.0)
        excess = (reach - num_active).to(tl.float32)
        weight_low = tl.where(enough, excess + 0.5, weight_low * share)
        weight_high = tl.where(enough, weight_high * share, 0.5 - excess)
        was_enough = enough
        below, above = float_of(low.to(tl.int32)), float_of((high - 1).to(tl.int32))
        guess = below + (above - below) * weight_low / (weight_low + weight_high)
        step += 1
    least = low.to(tl.int32)
    more = inside & (keys > least)
    equal = inside & (keys == least)
    needed = num_active - tl.sum(more.to(tl.int32))
    chosen = more | (equal & (tl.cumsum(equal.to(tl.int32)) <= needed))
    place = tl.arange(0, 8)
    eight = tl.reshape(chosen.to(tl.int32), (BLOCK_F // 8, 8)) << place[None, :]
    b = tl.arange(0, BLOCK_F // 8)
    packed = tl.sum(eight, 1).to(tl.uint8)
    tl.store(bits + row.to(tl.int64) * (width // 8) + b, packed, mask=b < width // 8)
    if COUNT_PASSES:
        tl.store(passes + row, step)


@triton.jit
def mask_tile(
    bits,
    z,
    w,
    num_tokens,
    width,
    samples,
    latent_dim,
    factor,
    HARD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Return the rows and columns of this program's tile, which exist, and the mean mask there.

    Scores are computed again where masks are soft.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t < num_tokens)[:, None] & (f < width)[None, :]
    rows = t.to(tl.int64)[:, None]
    mean = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for k in range(0, samples):
        row = rows * samples + k
        byte = tl.load(bits + row * (width // 8) + (f // 8)[None, :], mask=inside, other=0)
        chosen = ((byte.to(tl.int32) >> (f % 8)[None, :]) & 1).to(tl.float32)
        if HARD:
            mean += chosen
        else:
            score = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
            for i in range(0, latent_dim):
                z_i = tl.load(z + row * latent_dim + i, mask=(t < num_tokens)[:, None], other=0.0)
                w_i = tl.load(w + i * width + f, mask=f < width, other=0.0)
                score += z_i * w_i[None, :]
            mean += chosen * score
    return rows, f[None, :], inside, mean * factor


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
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Write the masked activation of a block of tokens and neurons."""
    rows, f, inside, mean = mask_tile(
        bits, z, w, num_tokens, width, samples, latent_dim, factor, HARD, BLOCK_T, BLOCK_F
    )
    if ACTIVATION == "swiglu":
        place = hidden + rows * (2 * width) + f
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        act = gate * tl.sigmoid(gate) * tl.load(place + width, mask=inside, other=0.0)
    else:
        pre = tl.load(hidden + rows * width + f, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "gelu":
            act, _ = gelu_tanh(pre)
        else:
            act = tl.maximum(pre, 0.0)
    out = rounded(act.to(tl.float32) * mean, a.dtype.element_ty)
    tl.store(a + rows * width + f, out, mask=inside)


@triton.jit
def backward_kernel(
    hidden,
    bits,
    z,
    w,
    da,
    dhidden,
    dmean,
    num_tokens,
    width,
    samples,
    latent_dim,
    factor,
    ACTIVATION: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Write the gradients of the pre-activation and of the mean mask."""
    rows, f, inside, mean = mask_tile(
        bits, z, w, num_tokens, width, samples, latent_dim, factor, HARD, BLOCK_T, BLOCK_F
    )
    dtype: tl.constexpr = dhidden.dtype.element_ty
    flat = rows * width + f
    gradient = tl.load(da + flat, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        place = rows * (2 * width) + f
        gate = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        up_ = tl.load(hidden + place + width, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(dmean + flat, gradient * silu * up_, mask=inside)
        gradient = gradient * mean
        dgate = gradient * up_ * (sigmoid + silu * (1 - sigmoid))
        tl.store(dhidden + place, rounded(dgate, dtype), mask=inside)
        tl.store(dhidden + place + width, rounded(gradient * silu, dtype), mask=inside)
    else:
        pre = tl.load(hidden + flat, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "gelu":
            act, slope = gelu_tanh(pre)
        else:
            act, slope = tl.maximum(pre, 0.0), tl.where(pre > 0, 1.0, 0.0)
        tl.store(dmean + flat, gradient * act, mask=inside)
        tl.store(dhidden + flat, rounded(gradient * mean * slope, dtype), mask=inside)
