"""Infinity-MoE over blocks of neurons: ours, for real sparsity and expert parallelism.

A mask is chosen over blocks, so a block is an expert of the ordinary layer and the mean over
samples of its mask values is its gate, which multiplies the hidden activation. It is exactly the
neuron model whose rows of W_z repeat within a block. Shapes: T tokens, D model dim, K slots (at
most samples x active blocks), S samples, Z latent dim, E blocks.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dmoe.moe.infinite.config import InfiniteConfig, num_active
from dmoe.moe.infinite.initial import gain, init_latents
from dmoe.moe.infinite.latent import LatentRouter, Noise
from dmoe.moe.infinite.statistics import sigma_sums, use_sums
from dmoe.moe.routers.base import Router, RouterSection
from dmoe.moe.routers.choice import slots_of
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.ops import router_gate
from dmoe.ops.top_mask import top_mask


class InfiniteSection(RouterSection):
    """What a model knows of the router that `model.moe.infinite` stands for."""

    takes_k = False
    balances_itself = True

    name: Literal["infinite"] = "infinite"
    infinite: InfiniteConfig

    @property
    def fixed_k(self) -> None:
        """Nothing: the samples of a token share blocks or neurons, so tokens differ."""

    def limits(self) -> dict[str, float | None]:
        """Return nothing: fractions are below 1."""
        return {}

    def nominal_k(self, num_experts: int) -> float:
        """Return the most that a token's samples use: that of samples which share nothing."""
        return self.most_k(num_experts)

    def most_k(self, num_experts: int) -> int:
        """Return the most blocks, or neurons of all layers, that a token may use in training."""
        fractions = self.infinite.fractions
        width = num_experts // len(fractions)
        chosen = (self.infinite.samples * num_active(f, width) for f in fractions)
        return sum(min(width, number) for number in chosen)

    def build(self, *, dim: int, num_experts: int) -> "BlockRouter":
        """Build the router of granularity block."""
        return BlockRouter(self.infinite, dim=dim, num_experts=num_experts)


class BlockRouter(Router):
    """Draws points of the expert space and goes to the blocks that they switch on."""

    def __init__(self, config: InfiniteConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.num_active = num_active(config.active_fraction, num_experts)
        self.gain = gain(config, self.num_active / num_experts)
        self.gate = BlockGate(config, dim=dim, num_experts=num_experts)
        init_latents(self)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D), to the blocks of all its samples."""
        scores_TSE, logits_TE, sums = self.gate(x_TD, context)
        num_samples = scores_TSE.shape[1]
        chosen_TSE = context.decide("chosen", lambda: self.select(scores_TSE, context))
        mask_TSE = scores_TSE * chosen_TSE
        if self.config.is_hard:
            mask_TSE = chosen_TSE + mask_TSE - mask_TSE.detach()
        weights_TE = self.gain * mask_TSE.mean(1)
        uses_TE = chosen_TSE.sum(1, dtype=torch.uint8)
        ids_TK = slots_of(uses_TE > 0, min(uses_TE.shape[1], num_samples * self.num_active))
        weights_TK = weights_TE.gather(1, ids_TK.clamp(min=0))
        sums |= use_sums(uses_TE, num_samples, self.num_active)
        return make_routing(logits_TE, logits_TE.softmax(-1), ids_TK, weights_TK, sums)

    def select(self, scores_TSE: Tensor, context: MoEContext) -> Tensor:
        """Return (T, S, E) bool, the blocks of each sample; padding chooses none."""
        chosen_TSE = top_mask(scores_TSE.flatten(0, 1), self.num_active).view_as(scores_TSE)
        if context.valid_T is None:
            return chosen_TSE
        return chosen_TSE & context.valid_T[:, None, None]


class BlockGate(nn.Module):
    """From a token to the scores of the blocks, at its samples and at its mean."""

    def __init__(self, config: InfiniteConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.latent = LatentRouter(config.router, dim=dim, latent_dim=config.latent_dim)
        self.w_z_FZ = nn.Parameter(torch.empty(num_experts, config.latent_dim))

    def forward(
        self, x_TD: Tensor, context: MoEContext
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the scores W_z z, (T, S, E), and their mean over samples, and sums of sigma."""
        latents = self.latent(x_TD, Noise(context), self.config.num_samples(context))
        scores = [router_gate(z_TZ, self.w_z_FZ) for z_TZ in latents.z_TKZ.unbind(1)]
        scores_TSE = torch.stack(scores, dim=1)
        return scores_TSE, scores_TSE.mean(1), sigma_sums(latents, context)
