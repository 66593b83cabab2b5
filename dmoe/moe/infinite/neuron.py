"""Infinity-MoE over single neurons, as in the paper (arXiv 2601.17680).

z_k ~ N(mu(x), diag sigma(x)^2), m_k = topN%(W_z z_k), y = 1/K sum_k W_down (m_k * act(W_up x)).
All weights are dense, and one pair of GEMMs serves all samples (`dmoe.ops.mean_mask`).
Shapes: T tokens, D model dim, K samples, F neurons.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.moe.base import SparseLayer
from dmoe.moe.experts import FeedForward
from dmoe.moe.infinite.config import InfiniteConfig
from dmoe.moe.infinite.initial import init_latents
from dmoe.moe.infinite.latent import LatentRouter, Latents, Noise
from dmoe.moe.infinite.space import ExpertSpace, Masks, masked_before
from dmoe.moe.infinite.statistics import mask_sums, sigma_sums
from dmoe.moe.routing import MoEContext
from dmoe.moe.stats import MoEOutput, MoEStats
from dmoe.ops import Activation
from dmoe.ops.activation import activate
from dmoe.ops.top_mask import count_by_column


class NeuronLayer(SparseLayer):
    """One dense network, of whose neurons each token uses those that its samples switch on.

    Args:
        config: the `model.moe.infinite` section.
        width: F, neurons of the expert space.
        dim: D.
        activation: of the neurons.
    """

    def __init__(
        self, config: InfiniteConfig, *, width: int, dim: int, activation: Activation = "swiglu"
    ):
        super().__init__()
        self.config, self.activation = config, activation
        [fraction] = config.fractions
        self.router = LatentRouter(config.router, dim=dim, latent_dim=config.latent_dim)
        self.space = ExpertSpace(config, width=width, fraction=fraction)
        self.neurons = FeedForward(dim=dim, ffn_dim=width, activation=activation)
        init_latents(self)

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 whatever the precision of the model."""
        return [self.router, self.space]

    def forward(self, x_TD: Tensor, context: MoEContext) -> tuple[Tensor, MoEOutput]:
        """Return y_TD, without the residual, and statistics; there are no losses."""
        latents = self.router(x_TD, Noise(context), self.config.num_samples(context))
        hidden_TH = self.neurons.up_proj(x_TD)
        a_TF, masks = self.space(hidden_TH, latents.z_TKZ, self.activation, context)
        y_TD = self.neurons.down_proj(a_TF)
        return y_TD, MoEOutput({}, measure_masks([self.space], [latents], [masks], context))

    def forward_loop(self, x_TD: Tensor, context: MoEContext) -> Tensor:
        """Define y_TD of `forward`: a masked network for each sample, and their mean."""
        z_TKZ = self.router(x_TD, Noise(context), self.config.num_samples(context)).z_TKZ
        hidden_TH = self.neurons.up_proj(x_TD)
        outputs = []
        for k in range(z_TKZ.shape[1]):
            mask_TF = self.space.mask(z_TKZ, k, context).to(hidden_TH.dtype)
            if self.config.mask_position == "after_activation":
                a_TF = activate(hidden_TH, self.activation) * mask_TF
            else:
                a_TF = masked_before(hidden_TH, mask_TF, self.activation)
            outputs.append(self.neurons.down_proj(a_TF))
        return self.space.gain * torch.stack(outputs).mean(0)


@torch.no_grad()
def measure_masks(
    spaces: Sequence[ExpertSpace],
    latents: Sequence[Latents],
    masks: Sequence[Masks],
    context: MoEContext,
) -> MoEStats:
    """Sum up the masks of a layer's spaces; counts are of (token, sample) pairs, space by space."""
    counts: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for space, mask in zip(spaces, masks, strict=True):
        counts.append(count_by_column(torch.cat(mask)))
        add(sums, mask_sums(mask, space.num_active), len(spaces))
    for latent in latents:
        add(sums, sigma_sums(latent, context), len(latents))
    return MoEStats(torch.cat(counts), counts[0].new_zeros(()), sums)


def add(sums: dict[str, Tensor], more: dict[str, Tensor], parts: int) -> None:
    """Add to sums what is one of so many equal parts."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value / parts
