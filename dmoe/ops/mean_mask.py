"""Activations under the mean of several masks, where no mask is ever stored in full.

For fixed x, W_down (m * h) is linear in m, so the mean over samples of masked networks is the
network under the mean mask: one pair of GEMMs for any number of samples (infinity-MoE, arXiv
2601.17680). Shapes: T tokens, C tokens of a piece, K samples, Z latent dim, F neurons, H = 2F if
gated, else F.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops.activation import Activation, activate, activate_backward
from dmoe.ops.top_mask import unpack_bits, unpack_bytes

Choose = Callable[[int, slice, Tensor], Tensor]
"""`choose(k, tokens, logits_CF)` returns the packed mask of sample k at those tokens: 1 where a
neuron is active."""

_PIECE_ELEMENTS = 2**19
"""Most numbers of a piece on a CPU: few enough to stay in the caches."""


class MaskRule(NamedTuple):
    """What a mask is made of."""

    hard: bool
    """Whether chosen neurons are at 1, instead of at their logit; the gradient is then that of the
    logit all the same (straight-through)."""
    scale: float
    """A constant factor."""


def masked_activation(
    hidden_TH: Tensor,
    z_TKZ: Tensor,
    w_FZ: Tensor,
    *,
    choose: Choose,
    rule: MaskRule,
    activation: Activation,
) -> Tensor:
    """Return act(hidden) * scale / K x sum_k m_k, where m_k is W_z z_k at the chosen neurons.

    Beside its inputs only the packed masks are saved, a bit a neuron and sample.

    Args:
        hidden_TH: pre-activations; for "swiglu" the gates, then the ups.
        z_TKZ: latent samples, float32 or wider; the mask is multiplied in the dtype of `hidden_TH`.
        w_FZ: W_z, the direction of each neuron in the latent space.
        choose: makes the choice of each sample from its logits, or repeats it.
        rule: what the mask is made of.
        activation: as in `expert_ffn`.

    Returns:
        (T, F) in the dtype of `hidden_TH`.
    """
    return _MaskedActivation.apply(hidden_TH, z_TKZ, w_FZ, choose, rule, activation)


def masked_activation_loop(
    hidden_TH: Tensor,
    z_TKZ: Tensor,
    w_FZ: Tensor,
    *,
    choose: Choose,
    rule: MaskRule,
    activation: Activation,
) -> Tensor:
    """Define `masked_activation`: each mask in full, autograd for the gradients."""
    masks = []
    for k, z_TZ in enumerate(z_TKZ.unbind(1)):
        logits_TF = z_TZ @ w_FZ.t()
        chosen_TF = unpack_bits(choose(k, slice(0, len(z_TZ)), logits_TF.detach()))
        soft_TF = logits_TF * chosen_TF
        masks.append(chosen_TF + soft_TF - soft_TF.detach() if rule.hard else soft_TF)
    mean_TF = rule.scale * torch.stack(masks).mean(0)
    return activate(hidden_TH, activation) * mean_TF.to(hidden_TH.dtype)


class _MaskedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        z_TKZ: Tensor,
        w_FZ: Tensor,
        choose: Choose,
        rule: MaskRule,
        activation: Activation,
    ) -> Tensor:
        a_TF = hidden_TH.new_empty(len(hidden_TH), len(w_FZ))
        pieces = _Pieces(z_TKZ, w_FZ, rule)
        packed = []
        for tokens in pieces:

            def bits(k: int, logits_CF: Tensor, tokens: slice = tokens) -> Tensor:
                packed.append(choose(k, tokens, logits_CF))
                return packed[-1]

            mean_CF = pieces.mean_mask(tokens, bits)
            act_CF = activate(hidden_TH[tokens], activation)
            torch.mul(act_CF, mean_CF.to(act_CF.dtype), out=a_TF[tokens])
        ctx.save_for_backward(hidden_TH, z_TKZ, w_FZ, *packed)
        ctx.rule, ctx.activation = rule, activation
        return a_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da_TF: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, z_TKZ, w_FZ, *packed = ctx.saved_tensors
        dhidden_TH, dz_TKZ = torch.empty_like(hidden_TH), torch.empty_like(z_TKZ)
        dw_FZ = torch.zeros_like(w_FZ)
        pieces = _Pieces(z_TKZ, w_FZ, ctx.rule)
        saved = iter(packed)
        for tokens in pieces:
            bits = [next(saved) for _ in range(z_TKZ.shape[1])]
            mean_CF = pieces.mean_mask(tokens, _given(bits))
            act_CF = activate_backward(
                hidden_TH[tokens],
                da_TF[tokens],
                mean_CF.to(hidden_TH.dtype),
                ctx.activation,
                out_RH=dhidden_TH[tokens],
            )
            dmean_CF = act_CF.mul_(da_TF[tokens]).to(w_FZ.dtype)
            pieces.mean_mask_backward(tokens, bits, dmean_CF, dz_TKZ, dw_FZ)
        return dhidden_TH, dz_TKZ, dw_FZ, None, None, None


def _given(bits: list[Tensor]) -> Callable[[int, Tensor], Tensor]:
    """Return what gives the masks that were chosen in the forward pass."""
    return lambda k, logits_CF: bits[k]


class _Pieces:
    """The tokens that are computed at a time, on a CPU a few and elsewhere all, and their masks.

    What a piece needs is written to the same memory again and again, which stays in the cache.
    """

    def __init__(self, z_TKZ: Tensor, w_FZ: Tensor, rule: MaskRule):
        self.z_TKZ, self.w_FZ, self.rule = z_TKZ, w_FZ, rule
        self.num_tokens, width = len(z_TKZ), len(w_FZ)
        fits = _PIECE_ELEMENTS // width if w_FZ.device.type == "cpu" else self.num_tokens
        self.size = max(1, min(fits, self.num_tokens))
        self.logits_CF, self.chosen_CF, self.mean_CF = w_FZ.new_empty(3, self.size, width)

    def __iter__(self) -> Iterator[slice]:
        """Yield the tokens of each piece; one piece at least."""
        for start in range(0, max(1, self.num_tokens), self.size):
            yield slice(start, min(start + self.size, self.num_tokens))

    def mean_mask(self, tokens: slice, bits: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Return (C, F), scale / K x sum_k m_k, until the next call; `bits` gives packed masks."""
        num = tokens.stop - tokens.start
        mean_CF, factor = self.mean_CF[:num].zero_(), self.rule.scale / self.z_TKZ.shape[1]
        for k, z_CZ in enumerate(self.z_TKZ[tokens].unbind(1)):
            logits_CF = torch.mm(z_CZ, self.w_FZ.t(), out=self.logits_CF[:num])
            chosen_CF = self.chosen_CF[:num].copy_(unpack_bytes(bits(k, logits_CF)))
            if self.rule.hard:
                mean_CF.add_(chosen_CF, alpha=factor)
            else:
                mean_CF.addcmul_(logits_CF, chosen_CF, value=factor)
        return mean_CF

    def mean_mask_backward(
        self, tokens: slice, bits: list[Tensor], dmean_CF: Tensor, dz_TKZ: Tensor, dw_FZ: Tensor
    ) -> None:
        """Write the gradient of z at these tokens, and add that of W_z; `dmean_CF` is scaled."""
        num = tokens.stop - tokens.start
        dmean_CF.mul_(self.rule.scale / self.z_TKZ.shape[1])
        for z_CZ, dz_CZ, of_sample in zip(
            self.z_TKZ[tokens].unbind(1), dz_TKZ[tokens].unbind(1), bits, strict=True
        ):
            chosen_CF = self.chosen_CF[:num].copy_(unpack_bytes(of_sample))
            dlogits_CF = torch.mul(dmean_CF, chosen_CF, out=self.logits_CF[:num])
            dz_CZ.copy_(dlogits_CF @ self.w_FZ)
            dw_FZ.addmm_(dlogits_CF.t(), z_CZ)
