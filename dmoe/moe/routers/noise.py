"""Noisy logits with learned noise, and the chance of being chosen that the noise makes smooth.

Shazeer et al. 2017, arXiv 1701.06538, section 2.1 and appendix A. Used by `noisy_top_k` and
`hierarchical`. Shapes: T tokens, D model dim, E experts, K slots per token.
"""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor, nn

from dmoe.config.base import ConfigError
from dmoe.moe.capacity import group_size_of
from dmoe.moe.losses.groups import GroupScope, groups_of_batch
from dmoe.moe.losses.variation import variation_losses
from dmoe.moe.routers.base import RouterSection
from dmoe.moe.routing import MoEContext
from dmoe.ops import router_gate
from dmoe.rng import stream_key, token_normal

_FAR = 1e9
"""Stands for an infinite threshold, and keeps gradients numbers."""


class NoisySection(RouterSection):
    """What the routers with learned noise have in common."""

    balances_itself = True

    noise: bool = True
    """Add normal noise to the logits in training, of a size that each expert learns for each
    token."""
    importance_weight: NonNegativeFloat = 0.1
    """Weight of the importance loss, CV^2 of the experts' sums of gates."""
    load_weight: NonNegativeFloat = 0.1
    """Weight of the load loss, CV^2 of the smooth estimate of the experts' tokens."""
    balance_scope: GroupScope = "micro_batch"
    """The set of tokens over which both losses sum; a number is that of consecutive tokens of a
    micro-batch. Not the global batch: unlike load_balance, the loss of a micro-batch would then
    need the gates of all others, not just counts."""

    @model_validator(mode="after")
    def _load_needs_noise(self) -> "NoisySection":
        if self.load_weight and not self.noise:
            raise ConfigError(
                f"load_weight = {self.load_weight:g}, but noise = false, and without noise the "
                f"load has no gradient: set load_weight to 0, or noise to true",
                key="load_weight",
            )
        return self

    def loss_weights(self) -> dict[str, float]:
        """Return the weights of the losses that are the router's own (`Routing.losses`)."""
        weights = {"importance": self.importance_weight, "load": self.load_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def group_size(self, num_tokens: int, context: MoEContext) -> int:
        """Return the tokens of a group of `balance_scope`."""
        return group_size_of(self.balance_scope, context, num_tokens)

    def losses(
        self, amounts: dict[str, Tensor], num_tokens: int, context: MoEContext
    ) -> dict[str, Tensor]:
        """Return this micro-batch's share of the losses on (G, E) amounts; none at inference."""
        if context.totals is None:
            return {}
        size = self.group_size(num_tokens, context)
        groups = groups_of_batch(self.balance_scope, size, num_tokens, context.totals)
        return variation_losses(amounts, groups)


class NoisyGate(nn.Module):
    """Two linear maps, in float32 at least: to the logits, and to the size of their noise.

    Both start at zero, so that at first the noise alone chooses.
    """

    starts_at_zero = True

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (T, E) logits without noise, and its (T, E) standard deviation."""
        std_TE = F.softplus(router_gate(x_TD, self.noise_weight)).clamp(min=1e-6)
        return router_gate(x_TD, self.weight), std_TE


def with_noise(clean_TE: Tensor, std_TE: Tensor, context: MoEContext) -> Tensor:
    """Return H(x) of eq. 4, clean + eps std with eps ~ N(0, 1); the noise follows the token."""
    assert context.token_ids_T is not None, "random routing needs the tokens' numbers"
    key = stream_key(context.seed, "router_noise", context.step, context.layer)
    noise_TE = token_normal(key, context.token_ids_T, clean_TE.shape[1])
    return clean_TE + noise_TE * std_TE


def chance_of_choice(
    noisy_TE: Tensor, clean_TE: Tensor, std_TE: Tensor, chosen_TE: Tensor
) -> Tensor:
    """Return P(x, i) of eq. 9: the chance that expert i is chosen if its noise is drawn again.

    Expert i is then compared with the k-th largest of the other experts' noisy logits: for a chosen
    one that is the best of those not chosen, for others the least of the chosen.

    Args:
        noisy_TE: (T, E) noisy logits; any further dims stand between T and E.
        clean_TE: (T, E) logits without noise.
        std_TE: (T, E) standard deviation of the noise.
        chosen_TE: (T, E) bool, the k largest noisy logits; none for padding.

    Returns:
        (T, E), 0 for a token without experts, 1 for one that has all.
    """
    best_out_T1 = noisy_TE.masked_fill(chosen_TE, -_FAR).amax(dim=-1, keepdim=True)
    least_in_T1 = noisy_TE.masked_fill(~chosen_TE, _FAR).amin(dim=-1, keepdim=True)
    threshold_TE = torch.where(chosen_TE, best_out_T1, least_in_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE)


def is_chosen(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Return (T, E) bool, which experts the tokens have."""
    chosen_TE = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    return chosen_TE.scatter(1, ids_TK + 1, True)[:, 1:]
