"""Experts that cost next to nothing, beside the networks: nothing, the token itself, a constant.

Paper: MoE++, arXiv 2410.07348, section 3.1; the identity experts of LongCat-Flash, arXiv
    2509.01322.
Equations: zero(x) = 0, copy(x) = x, constant(x) = a_1 x + a_2 v, with (a_1, a_2) = softmax(W x). A
    token that chooses one has fewer networks, so simple tokens cost less.
Config: `model.moe: {zero_computation: {zeros: 1, copies: 1, constants: 2, target_k: 3}, router:
    {name: top_k, top_k: 5, bias_update_rate: 0.001}}`.
Differs: `target_k` steers the mean number of networks by the selection bias of all experts, a step
    of one size at a time; LongCat-Flash moves that of the networks alone, in proportion to the
    error. MoE++'s gating residuals and its balance loss of two kinds of experts are not there.
Shapes: T tokens, D model dim, K slots, Z such experts, C constants.
"""

from typing import TYPE_CHECKING

import torch
from pydantic import NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor, nn

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.routing import Routing
from dmoe.ops import Linear

if TYPE_CHECKING:  # the section that holds this one
    from dmoe.moe.config import MoEConfig


class ZeroComputationConfig(ConfigModel):
    """Experts without a network, which the router chooses among like the others."""

    zeros: NonNegativeInt = 0
    """Experts that add nothing."""
    copies: NonNegativeInt = 0
    """Experts that add the token itself, as the layer reads it."""
    constants: NonNegativeInt = 0
    """Experts that add a x + b v, with a vector v of their own and the softmax (a, b) of a linear
    map of the token."""
    target_k: PositiveFloat | None = None
    """Networks per token on average that the router's selection bias steers to, which then needs
    `router.bias_update_rate`; null for an even load of all experts."""

    @property
    def num(self) -> int:
        """Z."""
        return self.zeros + self.copies + self.constants

    @model_validator(mode="after")
    def _there_are_some(self) -> "ZeroComputationConfig":
        if not self.num:
            raise ConfigError("zeros, copies and constants are all 0: leave the section out")
        return self

    def check(self, moe: "MoEConfig") -> None:
        """Check that the layer has networks to choose instead, and a bias to steer with.

        Raises:
            ConfigError: it does not; the key is one of `model.moe`.
        """
        if moe.infinite is not None or moe.router.stands_for_layer:
            kind = "infinite" if moe.infinite is not None else f"router.name = {moe.router.name}"
            raise ConfigError(
                f"zero_computation stands beside experts that tokens are sent to, which {kind} has "
                f"none of: leave it out",
                key="zero_computation",
            )
        if self.target_k is None:
            return
        if not getattr(moe.router, "bias_update_rate", 0.0):
            raise ConfigError(
                f"zero_computation.target_k = {self.target_k:g} is steered to by the selection "
                f"bias: set router.bias_update_rate, or leave target_k out",
                key="zero_computation.target_k",
            )
        k = moe.router.nominal_k(moe.experts)
        if self.target_k >= k:
            raise ConfigError(
                f"zero_computation.target_k = {self.target_k:g} is not below the {k:g} experts of "
                f"a token: lower it, or raise router.top_k",
                key="zero_computation.target_k",
            )

    def relative_load(self, counts_E: Tensor, k: float) -> Tensor:
        """Return the slots of each expert over those it should have, to be even at `target_k`.

        Args:
            counts_E: (E,) slots of the networks and then of the Z experts.
            k: experts of a token, of both kinds.
        """
        if self.target_k is None:
            return counts_E
        wanted_E = torch.full_like(
            counts_E, self.target_k / (len(counts_E) - self.num) / k, dtype=torch.float64
        )
        wanted_E[-self.num :] = (1 - self.target_k / k) / self.num
        return counts_E / wanted_E


class ZeroComputationExperts(nn.Module):
    """The experts of a layer from number `first` on: zero ones, copies, constants."""

    def __init__(self, config: ZeroComputationConfig, *, dim: int, first: int):
        super().__init__()
        self.config, self.first = config, first
        if config.constants:
            self.constants_CD = nn.Parameter(torch.empty(config.constants, dim))
            # For a layer that is used alone; a model draws its weights from its own seed.
            nn.init.normal_(self.constants_CD, std=0.02)
            self.mix = Linear(dim, 2 * config.constants, bias=False)

    def without(self, routing: Routing) -> Routing:
        """Return the routing to the networks alone."""
        here_TK = routing.expert_ids_TK >= self.first
        return routing._replace(
            expert_ids_TK=routing.expert_ids_TK.masked_fill(here_TK, -1),
            weights_TK=routing.weights_TK.masked_fill(here_TK, 0),
            scores_TE=routing.scores_TE[:, : self.first],
        )

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return (T, D) the sum of these experts' outputs times their gates."""
        config, ids_TK = self.config, routing.expert_ids_TK
        # The column before the first is for networks and unused slots.
        place_TK = (ids_TK - self.first + 1).clamp(min=0)
        gates_TZ = routing.weights_TK.new_zeros(len(x_TD), 1 + config.num)
        gates_TZ = gates_TZ.scatter_add(1, place_TK, routing.weights_TK)[:, 1 + config.zeros :]
        copies_TZ, constants_TC = gates_TZ.split([config.copies, config.constants], dim=1)
        y_TD = copies_TZ.sum(1, keepdim=True) * x_TD
        if config.constants:
            mix_T2C = self.mix(x_TD).to(gates_TZ.dtype).unflatten(1, (2, -1)).softmax(1)
            of_x_TC, of_constant_TC = (mix_T2C * constants_TC[:, None]).unbind(1)
            y_TD = y_TD + of_x_TC.sum(1, keepdim=True) * x_TD
            y_TD = y_TD + of_constant_TC @ self.constants_CD.to(gates_TZ.dtype)
        return y_TD.to(x_TD.dtype)
