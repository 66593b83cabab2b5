"""The expert space: which neurons (or blocks of them) a point z switches on, and how strongly.

m = topN%(W_z z) keeps the largest scores and is 0 elsewhere (infinity-MoE, arXiv 2601.17680).
Shapes: T tokens, K samples, Z latent dim, F neurons or blocks, H = 2F if gated, else F.
"""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.moe.infinite.config import InfiniteConfig, num_active
from dmoe.moe.infinite.initial import gain
from dmoe.moe.routing import MoEContext
from dmoe.ops import Activation, Backend, router_gate, uses_kernels
from dmoe.ops.activation import activate
from dmoe.ops.mean_mask import MaskRule, masked_activation
from dmoe.ops.top_mask import top_bits, unpack_bits
from dmoe.ops.triton_masks import masked_activation_by_triton

Masks = list[Tensor]
"""The packed mask of each sample, (T, F / 8) uint8."""


class ExpertSpace(nn.Module):
    """Holds W_z, the direction of each neuron or block in the latent space, in float32 at least.

    Args:
        config: the `model.moe.infinite` section.
        width: F.
        fraction: of neurons or blocks that one point switches on.
        layer: number of this space in its layer.
        at_mean: whether it gets the mean of z in training.
    """

    backend: Backend = "auto"
    """That of the layer; "triton" has kernels for masks that follow the activation."""

    def __init__(
        self,
        config: InfiniteConfig,
        *,
        width: int,
        fraction: float,
        layer: int = 0,
        at_mean: bool = False,
    ):
        super().__init__()
        self.config, self.layer = config, layer
        self.num_active = num_active(fraction, width)
        self.hard = config.is_hard
        self.gain = gain(config, self.num_active / width, at_mean=at_mean)
        self.rule = MaskRule(self.hard, self.gain)
        self.w_z_FZ = nn.Parameter(torch.empty(width, config.latent_dim))

    def forward(
        self,
        hidden_TH: Tensor,
        z_TKZ: Tensor,
        activation: Activation,
        context: MoEContext,
    ) -> tuple[Tensor, Masks]:
        """Return (T, F), the mean over samples of masked activations, and the masks.

        Args:
            hidden_TH: pre-activations; for "swiglu" the gates, then the ups.
            z_TKZ: samples.
            activation: of the neurons.
            context: of the micro-batch; padding has empty masks.
        """
        # A hard mask before the activation is one after it: act(0) = 0 and act(1 h) = act(h).
        is_after = self.config.mask_position == "after_activation" or self.hard
        if is_after and uses_kernels(self.backend, hidden_TH.device, hidden_TH.dtype):
            return self._by_kernels(hidden_TH, z_TKZ, activation, context)
        pieces: dict[int, dict[int, Tensor]] = {}

        def choose(k: int, tokens: slice, scores_CF: Tensor) -> Tensor:
            bits = self._choose(k, tokens, scores_CF, context)
            pieces.setdefault(k, {})[tokens.start] = bits
            return bits

        if is_after:
            a_TF = masked_activation(
                hidden_TH,
                z_TKZ,
                self.w_z_FZ,
                choose=choose,
                rule=self.rule,
                activation=activation,
            )
            return a_TF, _whole(pieces)

        def before(hidden_TH: Tensor, z_TZ: Tensor, w_z_FZ: Tensor, k: int) -> Tensor:
            scores_TF = router_gate(z_TZ, w_z_FZ)
            mask_TF = scores_TF * unpack_bits(choose(k, slice(0, len(z_TZ)), scores_TF))
            return masked_before(hidden_TH, mask_TF.to(hidden_TH.dtype), activation)

        # What is as large as the neurons is computed again in the backward pass, not kept.
        samples = [
            checkpoint(before, hidden_TH, z_TZ, self.w_z_FZ, k, use_reentrant=False)
            for k, z_TZ in enumerate(z_TKZ.unbind(1))
        ]
        total_TF = functools.reduce(torch.add, samples)
        return total_TF * (self.gain / len(samples)), _whole(pieces)

    def _by_kernels(
        self, hidden_TH: Tensor, z_TKZ: Tensor, activation: Activation, context: MoEContext
    ) -> tuple[Tensor, Masks]:
        """Do `forward` for all samples at once."""
        a_TF, bits = masked_activation_by_triton(
            hidden_TH,
            z_TKZ,
            self.w_z_FZ,
            self.num_active,
            rule=self.rule,
            activation=activation,
            decide=functools.partial(context.decide, f"masks_{self.layer}"),
            valid_T=context.valid_T,
        )
        return a_TF, list(bits.unbind(1))

    def mask(self, z_TKZ: Tensor, k: int, context: MoEContext) -> Tensor:
        """Return (T, F), the mask of sample k; a hard one has the gradient of a soft one."""
        scores_TF = router_gate(z_TKZ[:, k], self.w_z_FZ)
        chosen_TF = unpack_bits(self._choose(k, slice(0, len(z_TKZ)), scores_TF, context))
        soft_TF = scores_TF * chosen_TF
        return chosen_TF + soft_TF - soft_TF.detach() if self.hard else soft_TF

    def _choose(self, k: int, tokens: slice, scores_CF: Tensor, context: MoEContext) -> Tensor:
        def select() -> Tensor:
            bits = top_bits(scores_CF, self.num_active)
            return bits if context.valid_T is None else bits * context.valid_T[tokens, None]

        return context.decide(f"mask_{self.layer}_{k}_{tokens.start}_{tokens.stop}", select)


def _whole(pieces: dict[int, dict[int, Tensor]]) -> Masks:
    """Put the masks of each sample together, which were chosen a piece of the tokens at a time."""
    return [torch.cat([*of_sample.values()]) for of_sample in pieces.values()]


def masked_before(hidden_TH: Tensor, mask_TF: Tensor, activation: Activation) -> Tensor:
    """Return act(mask * hidden), (T, F); with gates the mask multiplies the gates."""
    if activation != "swiglu":
        return activate(hidden_TH * mask_TF, activation)
    gate_TF, up_TF = hidden_TH.chunk(2, dim=-1)
    return activate(torch.cat([gate_TF * mask_TF, up_TF], dim=-1), activation)
