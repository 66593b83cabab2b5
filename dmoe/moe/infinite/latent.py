"""The router of infinity-MoE: for each token a distribution over the latent space, and samples.

z_k = mu(x) + sigma(x) * eps_k with eps_k ~ N(0, I), so that the gradient reaches mu and sigma
(arXiv 2601.17680; the reparameterisation is our reading). All of it is float32 at least. Noise
follows the token's number, so it is the same under recomputation and on every rank.
Shapes: T tokens, D input dim, K samples, Z latent dim, M components of a mixture.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.moe.infinite.config import GaussianConfig, MixtureConfig
from dmoe.moe.routing import MoEContext
from dmoe.ops import router_gate, top_k_ids
from dmoe.rng import stream_key, token_normal, token_uniform


class Latents(NamedTuple):
    """Points of the expert space that tokens go to."""

    z_TKZ: Tensor
    """(T, K, Z) float32 samples."""
    sigma_TX: Tensor
    """(T, M Z) standard deviations, for the statistics."""


@dataclass(frozen=True)
class Noise:
    """The random numbers of one router in one micro-batch."""

    context: MoEContext
    router: int = 0
    """Number of the router in its layer."""
    first_sample: int = 0
    """Number of the first sample that is drawn."""

    def normal(self, sample: int, num: int) -> Tensor:
        """Return (T, num) standard normal numbers of a sample."""
        return token_normal(self._key("infinite", sample), self._token_ids(), num)

    def gumbel(self, sample: int, num: int) -> Tensor:
        """Return (T, num) Gumbel numbers of a sample."""
        uniform = token_uniform(self._key("infinite_choice", sample), self._token_ids(), num)
        # Half a step away from 0, whose logarithm is infinite.
        return -(-(uniform.double() + 2.0**-25).log()).log()

    def _key(self, stream: str, sample: int) -> int:
        context = self.context
        # Each sample has a key: the first of eight samples is the first of two.
        return stream_key(context.seed, stream, context.step, context.layer, self.router, sample)

    def _token_ids(self) -> Tensor:
        assert self.context.token_ids_T is not None, "random routing needs the tokens' numbers"
        return self.context.token_ids_T


class WideLinear(nn.Module):
    """A linear map with a bias, computed in float32 at least."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map (T, D) to (T, out)."""
        return router_gate(x_TD, self.weight) + self.bias


class LatentRouter(nn.Module):
    """Maps a token to one or more normal distributions, and draws from them.

    At the start a mean has variance 1, as the input has, and sigma is 1.
    """

    def __init__(self, config: GaussianConfig | MixtureConfig, *, dim: int, latent_dim: int):
        super().__init__()
        self.config, self.latent_dim = config, latent_dim
        self.mixture = config if isinstance(config, MixtureConfig) else None
        self.num_components = self.mixture.components if self.mixture else 1
        width = config.hidden_dim or dim
        self.hidden = WideLinear(dim, width) if config.hidden_dim else None
        self.mean = WideLinear(width, self.num_components * latent_dim)
        self.log_variance = WideLinear(width, self.num_components * latent_dim)
        self.choice = WideLinear(width, self.num_components) if self.mixture else None

    def forward(self, x_TD: Tensor, noise: Noise, num_samples: int) -> Latents:
        """Return `num_samples` samples of each token; the mean as the only one where it is 0."""
        if self.hidden is not None:
            h = F.gelu(self.hidden(x_TD), approximate="tanh")
            x_TD = F.rms_norm(h, h.shape[-1:])
        shape = (-1, self.num_components, self.latent_dim)
        mean_TMZ = self.mean(x_TD).view(shape)
        low, high = self.config.log_variance_min, self.config.log_variance_max
        sigma_TMZ = (0.5 * self.log_variance(x_TD).clamp(low, high)).exp().view(shape)
        choice_TM = None if self.choice is None else self.choice(x_TD)
        if num_samples:
            samples = [
                self._sample(mean_TMZ, sigma_TMZ, choice_TM, noise, noise.first_sample + k)
                for k in range(num_samples)
            ]
        else:
            samples = [self._mean(mean_TMZ, choice_TM)]
        return Latents(torch.stack(samples, dim=1), sigma_TMZ.detach().flatten(1))

    def _sample(
        self,
        mean_TMZ: Tensor,
        sigma_TMZ: Tensor,
        choice_TM: Tensor | None,
        noise: Noise,
        sample: int,
    ) -> Tensor:
        eps_TZ = noise.normal(sample, self.latent_dim).to(mean_TMZ.dtype)
        z_TMZ = mean_TMZ + sigma_TMZ * eps_TZ[:, None]
        if choice_TM is None:
            return z_TMZ[:, 0]
        assert self.mixture is not None
        gumbel_TM = noise.gumbel(sample, self.num_components).to(choice_TM.dtype)
        soft_TM = ((choice_TM + gumbel_TM) / self.mixture.temperature).softmax(-1)
        ids_T = noise.context.decide(
            f"component_{noise.router}_{sample}", lambda: top_k_ids(soft_TM, 1)[:, 0]
        )
        hard_TM = F.one_hot(ids_T, self.num_components).to(soft_TM)
        return mixed(z_TMZ, hard_TM + soft_TM - soft_TM.detach())

    def _mean(self, mean_TMZ: Tensor, choice_TM: Tensor | None) -> Tensor:
        if choice_TM is None:
            return mean_TMZ[:, 0]
        assert self.mixture is not None
        soft_TM = choice_TM.softmax(-1)
        if self.mixture.mean == "average":
            return mixed(mean_TMZ, soft_TM)
        hard_TM = F.one_hot(top_k_ids(soft_TM, 1)[:, 0], self.num_components).to(soft_TM)
        return mixed(mean_TMZ, hard_TM + soft_TM - soft_TM.detach())


def mixed(values_TMZ: Tensor, weights_TM: Tensor) -> Tensor:
    """Return (T, Z), the weighted sum over components."""
    return (values_TMZ * weights_TM[:, :, None]).sum(1)
