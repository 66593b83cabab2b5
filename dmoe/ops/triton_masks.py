"""The Triton back end of `masked_activation`, and the masks themselves, chosen in one pass.

Shapes: T tokens, K samples, Z latent dim, F neurons, H = 2F if gated, else F.
"""

from typing import Any

import torch
from torch import Tensor

from dmoe.ops.activation import Activation
from dmoe.ops.mean_mask import MaskRule
from dmoe.ops.top_mask import unpack_bits


def latent_masks_by_triton(z_TKZ: Tensor, w_FZ: Tensor, n: int) -> Tensor:
    """Return (T, K, F / 8) uint8, `top_bits` of the scores W_z z of each sample.

    Args:
        z_TKZ: float32 samples.
        w_FZ: float32 W_z, F a multiple of 8.
        n: neurons of a mask.
    """
    from dmoe_kernels.mean_mask import latent_masks

    return latent_masks(z_TKZ.detach(), w_FZ.detach(), n)


def masked_activation_by_triton(
    hidden_TH: Tensor,
    z_TKZ: Tensor,
    w_FZ: Tensor,
    bits: Tensor,
    *,
    rule: MaskRule,
    activation: Activation,
) -> Tensor:
    """Do `masked_activation` with (T, K, F / 8) masks that are chosen already; saves its inputs."""
    return _MaskedActivation.apply(hidden_TH.contiguous(), z_TKZ, w_FZ, bits, rule, activation)


class _MaskedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        z_TKZ: Tensor,
        w_FZ: Tensor,
        bits: Tensor,
        rule: MaskRule,
        activation: Activation,
    ) -> Tensor:
        from dmoe_kernels.mean_mask import masked_activation

        ctx.save_for_backward(hidden_TH, bits, z_TKZ, w_FZ)
        ctx.rule, ctx.activation = rule, activation
        return masked_activation(hidden_TH, bits, z_TKZ, w_FZ, activation, **rule._asdict())

    @staticmethod
    def backward(ctx: Any, da_TF: Tensor) -> tuple[Tensor | None, ...]:
        from dmoe_kernels.mean_mask import masked_activation_backward

        _, bits, z_TKZ, w_FZ = ctx.saved_tensors
        dhidden_TH, dmean_TF = masked_activation_backward(
            da_TF.contiguous(), *ctx.saved_tensors, ctx.activation, **ctx.rule._asdict()
        )
        dmean_TF.mul_(ctx.rule.scale / z_TKZ.shape[1])
        dz_TKZ, dw_FZ = torch.empty_like(z_TKZ), torch.zeros_like(w_FZ)
        for k, of_sample in enumerate(bits.unbind(1)):
            dscores_TF = dmean_TF * unpack_bits(of_sample)
            dz_TKZ[:, k] = dscores_TF @ w_FZ
            dw_FZ.addmm_(dscores_TF.t(), z_TKZ[:, k])
        return dhidden_TH, dz_TKZ, dw_FZ, None, None, None
