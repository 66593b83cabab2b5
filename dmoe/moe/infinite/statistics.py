"""What infinity-MoE layers report of themselves: sums over the tokens that are not padding.

Shapes: T tokens, K samples, F neurons or blocks.
"""

import functools
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from dmoe.moe.infinite.latent import Latents
from dmoe.moe.routing import MoEContext
from dmoe.ops.top_mask import count_ones


@torch.no_grad()
def sigma_sums(latents: Latents, context: MoEContext) -> dict[str, Tensor]:
    """Return the sums over tokens of the mean sigma and the mean squared sigma of a token."""
    sigma_TX = latents.sigma_TX.double()
    if context.valid_T is not None:
        sigma_TX = sigma_TX[context.valid_T]
    return {
        "sigma": sigma_TX.mean(1).sum(),
        "sigma_square": sigma_TX.square().mean(1).sum(),
    }


@torch.no_grad()
def mask_sums(masks: Sequence[Tensor], num_active: int) -> dict[str, Tensor]:
    """Return sums over tokens of what their samples' masks switch on.

    Args:
        masks: the packed mask of each sample, (T, F / 8) uint8; empty for padding.
        num_active: neurons of one mask.

    Returns:
        `active`: neurons active in any sample, as a fraction of all. `overlap`, where K > 1: the
        neurons that two masks share as a fraction of those of one, mean over pairs.
    """
    used = count_ones(functools.reduce(torch.bitwise_or, masks))
    shared = sum(count_ones(a & b) for a, b in combinations(masks, 2))
    return _sums(used, shared, len(masks), num_active, 8 * masks[0].shape[1])


@torch.no_grad()
def use_sums(uses_TF: Tensor, num_samples: int, num_active: int) -> dict[str, Tensor]:
    """Return the sums of `mask_sums` where they are known by their numbers.

    Args:
        uses_TF: (T, F) uint8 samples that each block is active in; 0 for padding.
        num_samples: K.
        num_active: blocks of one mask.
    """
    wide_TF = uses_TF.int()
    shared = (wide_TF * (wide_TF - 1)).sum() / 2
    return _sums((uses_TF > 0).sum(), shared, num_samples, num_active, uses_TF.shape[1])


def _sums(
    used: Tensor, shared: Tensor | int, num_samples: int, num_active: int, width: int
) -> dict[str, Tensor]:
    """Bring to fractions the used neurons, and the shared ones of all pairs of samples."""
    sums = {"active": used / width}
    if num_samples > 1:
        assert isinstance(shared, Tensor)
        sums["overlap"] = shared / (num_samples * (num_samples - 1) / 2 * num_active)
    return sums
