"""The Triton back end of `masked_activation`: masks are chosen and applied in one pass.

Shapes: T tokens, K samples, Z latent dim, F neurons, H = 2F if gated, else F.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops.activation import Activation
from dmoe.ops.mean_mask import MaskRule

Decide = Callable[[Callable[[], Tensor]], Tensor]
"""`decide(select)` returns the masks that `select` makes, or those that it made before."""


def masked_activation_by_triton(
    hidden_TH: Tensor,
    z_TKZ: Tensor,
    w_FZ: Tensor,
    n: int,
    *,
    rule: MaskRule,
    activation: Activation,
    decide: Decide,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do `masked_activation` with `top_bits` of the scores W_z z of each sample; saves its inputs.

    Args:
        hidden_TH: pre-activations; for "swiglu" the gates, then the ups.
        z_TKZ: float32 samples.
        w_FZ: float32 W_z, F a multiple of 8.
        n: neurons of a mask.
        rule: what the mask is made of.
        activation: as in `expert_ffn`.
        decide: where masks are given back that were chosen before, they are only applied.
        valid_T: bool, False where a token gets empty masks, or None.

    Returns:
        (T, F) in the dtype of `hidden_TH`, and the masks, (T, K, F / 8) uint8.
    """
    return _MaskedActivation.apply(
        hidden_TH.contiguous(),
        z_TKZ,
        w_FZ,
        n,
        rule,
        activation,
        decide,
        None if valid_T is None else valid_T.contiguous(),
    )


class _MaskedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        z_TKZ: Tensor,
        w_FZ: Tensor,
        n: int,
        rule: MaskRule,
        activation: Activation,
        decide: Decide,
        valid_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from dmoe_kernels.chosen_masks import chosen_activation
        from dmoe_kernels.mean_mask import masked_activation

        made: list[Tensor] = []

        def select() -> Tensor:
            a_TF, bits = chosen_activation(
                hidden_TH, z_TKZ, w_FZ, n, activation, valid_T=valid_T, **rule._asdict()
            )
            made.append(a_TF)
            return bits

        bits = decide(select)
        if not made:
            a_TF = masked_activation(hidden_TH, bits, z_TKZ, w_FZ, activation, **rule._asdict())
            made.append(a_TF)
        ctx.save_for_backward(hidden_TH, bits, z_TKZ, w_FZ)
        ctx.mark_non_differentiable(bits)
        ctx.rule, ctx.activation = rule, activation
        return made[0], bits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da_TF: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        from dmoe_kernels.mean_mask import masked_activation_backward

        gradients = masked_activation_backward(
            da_TF.contiguous(), *ctx.saved_tensors, ctx.activation, **ctx.rule._asdict()
        )
        return *gradients, None, None, None, None, None
