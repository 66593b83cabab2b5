"""The mean of several masks of a layer of neurons, and the activation that it multiplies.

For fixed x, W_down (m * h) is linear in m, so the mean over samples of masked networks is the
network under the mean mask: one pair of GEMMs for any number of samples (infinity-MoE, arXiv
2601.17680). Shapes: T tokens, K samples, Z latent dim, F neurons, H = 2F if gated, else F.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.activation import Activation, activate
from dmoe.ops.top_mask import unpack_bits

Choose = Callable[[int, Tensor], Tensor]
"""`choose(k, logits_TF)` returns the packed mask of sample k: 1 where a neuron is active."""


def mean_mask(z_TKZ: Tensor, w_FZ: Tensor, *, choose: Choose, hard: bool, scale: float) -> Tensor:
    """Return scale / K x sum_k m_k, where m_k is W_z z_k at the chosen neurons and 0 elsewhere.

    A hard mask is 1 at the chosen neurons; its gradient is that of the soft one (straight-through).
    Beside its inputs only the packed masks are saved, a bit a neuron and sample.

    Args:
        z_TKZ: latent samples, float32 or wider.
        w_FZ: W_z, the direction of each neuron in the latent space.
        choose: makes the choice of each sample from its logits, or repeats it.
        hard: whether chosen neurons are at 1, instead of at their logit.
        scale: a constant factor.

    Returns:
        (T, F) in the dtype of `z_TKZ`.
    """
    return _MeanMask.apply(z_TKZ, w_FZ, choose, hard, scale)


def mean_mask_loop(
    z_TKZ: Tensor, w_FZ: Tensor, *, choose: Choose, hard: bool, scale: float
) -> Tensor:
    """Define `mean_mask`: each mask in full, autograd for the gradients."""
    masks = []
    for k, z_TZ in enumerate(z_TKZ.unbind(1)):
        logits_TF = z_TZ @ w_FZ.t()
        chosen_TF = unpack_bits(choose(k, logits_TF.detach()))
        soft_TF = logits_TF * chosen_TF
        masks.append(chosen_TF + soft_TF - soft_TF.detach() if hard else soft_TF)
    return scale * torch.stack(masks).mean(0)


def masked_activation(hidden_TH: Tensor, mask_TF: Tensor, activation: Activation) -> Tensor:
    """Return act(hidden) * mask, (T, F) in the dtype of `hidden_TH`; saves its inputs alone.

    Args:
        hidden_TH: pre-activations; for "swiglu" the gates, then the ups.
        mask_TF: as wide or wider; it is multiplied in the dtype of `hidden_TH`.
        activation: as in `expert_ffn`.
    """
    return _MaskedActivation.apply(hidden_TH, mask_TF, activation)


class _MeanMask(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_TKZ: Tensor, w_FZ: Tensor, choose: Choose, hard: bool, scale: float
    ) -> Tensor:
        factor = scale / z_TKZ.shape[1]
        mean_TF = z_TKZ.new_zeros(z_TKZ.shape[0], w_FZ.shape[0])
        packed = []
        for k, z_TZ in enumerate(z_TKZ.unbind(1)):
            logits_TF = z_TZ @ w_FZ.t()
            packed.append(choose(k, logits_TF))
            chosen_TF = unpack_bits(packed[-1])
            if hard:
                mean_TF.add_(chosen_TF, alpha=factor)
            else:
                mean_TF.addcmul_(logits_TF, chosen_TF.to(logits_TF), value=factor)
        ctx.save_for_backward(z_TKZ, w_FZ, *packed)
        ctx.factor = factor
        return mean_TF

    @staticmethod
    def backward(ctx: Any, dmean_TF: Tensor) -> tuple[Tensor | None, ...]:
        z_TKZ, w_FZ, *packed = ctx.saved_tensors
        dz_TKZ, dw_FZ = torch.empty_like(z_TKZ), torch.zeros_like(w_FZ)
        for k, bits in enumerate(packed):
            dlogits_TF = dmean_TF * unpack_bits(bits)
            torch.mul(dlogits_TF @ w_FZ, ctx.factor, out=dz_TKZ[:, k])
            dw_FZ.addmm_(dlogits_TF.t(), z_TKZ[:, k], alpha=ctx.factor)
        return dz_TKZ, dw_FZ, None, None, None


class _MaskedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, mask_TF: Tensor, activation: Activation) -> Tensor:
        narrow_TF = mask_TF.to(hidden_TH.dtype)
        ctx.save_for_backward(hidden_TH, narrow_TF)
        ctx.activation, ctx.mask_dtype = activation, mask_TF.dtype
        return activate(hidden_TH, activation).mul_(narrow_TF)

    @staticmethod
    def backward(ctx: Any, da_TF: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_TH, mask_TF = ctx.saved_tensors
        if ctx.activation == "swiglu":
            gate_TF, up_TF = hidden_TH.chunk(2, dim=-1)
            silu_TF = F.silu(gate_TF)
            dmask_TF = da_TF * silu_TF * up_TF
            dact_TF = da_TF * mask_TF
            dhidden_TH = torch.empty_like(hidden_TH)
            dgate_TF, dup_TF = dhidden_TH.chunk(2, dim=-1)
            torch.mul(dact_TF, silu_TF, out=dup_TF)
            torch.ops.aten.silu_backward.grad_input(
                dact_TF.mul_(up_TF), gate_TF, grad_input=dgate_TF
            )
        else:
            dmask_TF = da_TF * activate(hidden_TH, ctx.activation)
            dact_TF = da_TF * mask_TF
            if ctx.activation == "gelu":
                dhidden_TH = torch.ops.aten.gelu_backward(dact_TF, hidden_TH, approximate="tanh")
            else:
                dhidden_TH = dact_TF * (hidden_TH > 0)
        return dhidden_TH, dmask_TF.to(ctx.mask_dtype), None
