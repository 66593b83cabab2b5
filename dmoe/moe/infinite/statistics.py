"""What infinity-MoE layers report of themselves: sums over the tokens that are not padding.

Shapes: T tokens, K samples, F neurons or blocks.
"""

import torch
from torch import Tensor

from dmoe.moe.infinite.latent import Latents
from dmoe.moe.routing import MoEContext


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
def mask_sums(uses_TF: Tensor, num_samples: int, num_active: int) -> dict[str, Tensor]:
    """Return sums over tokens of what their samples' masks switch on.

    Args:
        uses_TF: (T, F) uint8 samples that each neuron or block is active in; 0 for padding.
        num_samples: K.
        num_active: neurons or blocks of one mask.

    Returns:
        `active`: neurons active in any sample, as a fraction of all. `overlap`, where K > 1: the
        neurons that two masks share as a fraction of those of one, mean over pairs.
    """
    sums = {"active": (uses_TF > 0).sum() / uses_TF.shape[1]}
    if num_samples > 1:
        wide_TF = uses_TF.int()
        shared = (wide_TF * (wide_TF - 1)).sum()  # ordered pairs of samples that share a neuron
        sums["overlap"] = shared / (num_samples * (num_samples - 1) * num_active)
    return sums
