"""Scores W_z z of samples in the latent space of infinity-MoE: products as exact as float32.

Scores are written for a piece of the tokens at a time, to the same memory, or made a tile at a time
within a kernel. Shapes: T tokens, C tokens of a piece, K samples, Z latent dim, F neurons.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_kernels.common import dot

SCRATCH_BYTES = 2**27
"""Most memory of the scores, or of their gradients, that exist at a time."""

PRECISION = "ieee" if torch.version.hip else "tf32x3"
"""Of scores: that of float32, for which NVIDIA's tensor cores take three products of TF32."""

SCORES = {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_Z": 32, "num_warps": 8, "num_stages": 2}
"""The tile of a program, which fits the registers of every target."""


def latent_scores(z_TKZ: Tensor, w_FZ: Tensor) -> Tensor:
    """Return (T, K, F) float32, the scores that masks are chosen by, all at once."""
    scores_TKF = w_FZ.new_empty(*z_TKZ.shape[:2], len(w_FZ))
    for tokens, scores_CKF in scores_of_pieces(z_TKZ, w_FZ):
        scores_TKF[tokens] = scores_CKF
    return scores_TKF


def scores_of_pieces(z_TKZ: Tensor, w_FZ: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens of each piece and their scores, which the next piece overwrites."""
    (_, samples, latent_dim), width = z_TKZ.shape, len(w_FZ)
    z_TKZ, w_FZ = z_TKZ.contiguous(), w_FZ.contiguous()
    for tokens, scores_CKF in pieces(z_TKZ, w_FZ):
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


def pieces(z_TKZ: Tensor, w_FZ: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens of each piece, and (C, K, F) float32 memory, the same for all."""
    num_tokens, samples, width = *z_TKZ.shape[:2], len(w_FZ)
    size = max(1, SCRATCH_BYTES // (4 * 64 * samples * width)) * 64
    scratch = w_FZ.new_empty(min(size, num_tokens), samples, width)
    for start in range(0, num_tokens, size):
        tokens = slice(start, min(start + size, num_tokens))
        yield tokens, scratch[: tokens.stop - start]


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
