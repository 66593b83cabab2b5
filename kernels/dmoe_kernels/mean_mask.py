"""Infinity-MoE over neurons: the activation under the mean of masks that are known, and backward.

Scores of soft masks are computed again, a tile at a time, and never written. Shapes: T tokens, C
tokens of a piece, K samples, Z latent dim, F neurons, H = 2F if gated, else F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import rounded, swiglu, ungated
from dmoe_kernels.latent_scores import PRECISION, pieces, product_tile

TILE = {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_Z": 32, "num_warps": 8, "num_stages": 1}
"""The tile of a program, which fits the registers of every target."""


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
        bits: (T, K, F / 8) uint8, a bit a neuron, the first in the lowest bit of a byte.
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
    for tokens, dscores_CKF in pieces(z_TKZ, w_FZ):
        tensors = [da_TF[tokens], dhidden_TH[tokens], dscores_CKF]
        part = hidden_TH[tokens], bits[tokens], z_TKZ[tokens]
        _launch(backward_kernel, *part, w_FZ, tensors, activation, hard, scale)
        dscores_RF = dscores_CKF.flatten(0, 1)
        torch.mm(dscores_RF, w_FZ, out=dz_TKZ[tokens].flatten(0, 1))
        dw_FZ.addmm_(dscores_RF.t(), z_TKZ[tokens].flatten(0, 1))
    return dhidden_TH, dz_TKZ, dw_FZ


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
def activated(hidden, rows, f, inside, width, ACTIVATION: tl.constexpr):
    """Return the activation of neurons `f` at some rows, in float32."""
    if ACTIVATION == "swiglu":
        place = hidden + rows * (2 * width) + f
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        up_ = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
        act = swiglu(gate, up_)
    else:
        pre = tl.load(hidden + rows * width + f, mask=inside, other=0.0).to(tl.float32)
        act, _ = ungated(pre, ACTIVATION)
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
        act, slope = ungated(pre, ACTIVATION)
        tl.store(dhidden + flat, rounded(dact * slope, dtype), mask=inside)
    dmean = gradient * act * factor
    for k in range(0, samples):
        row = t.to(tl.int64) * samples + k
        chosen = bits_tile(bits, row, t < num_tokens, width, BLOCK_T, BLOCK_F)
        tl.store(dscores + row[:, None] * width + f[None, :], dmean * chosen, mask=inside)
