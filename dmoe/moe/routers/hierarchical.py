"""Two-level hierarchical MoE: noisy top-k over groups of experts, and again within each.

Paper: Shazeer et al. 2017, arXiv 1701.06538, appendix B.
Equations: an expert's gate is the product of those of both levels (eq. 12); the load of an
    expert is that of its group times its own within, over the tokens of the group (eq. 14).
Config: `model.moe.router: {name: hierarchical, num_groups: 4}`.
Differs: one product makes the logits of both levels for every token.
Shapes: T tokens, D model dim, A groups, B experts of a group, E = A B experts, P groups and K
    experts a token uses, G sets of S tokens that a loss sums over.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.moe.losses.groups import in_groups
from dmoe.moe.routers.base import Router
from dmoe.moe.routers.choice import scores_of, slots_of
from dmoe.moe.routers.noise import (
    NoisyGate,
    NoisySection,
    chance_of_choice,
    is_chosen,
    with_noise,
)
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.ops import top_k_ids

if TYPE_CHECKING:  # the section that holds this one
    from dmoe.moe.config import MoEConfig


class HierarchicalConfig(NoisySection):
    """Each token goes to a few experts of a few groups."""

    takes_k: ClassVar[bool] = False

    name: Literal["hierarchical"]
    """Noisy top-k over groups of experts, and again within each chosen group."""
    num_groups: PositiveInt
    """Equal groups of consecutive experts, a."""
    groups_per_token: PositiveInt = 2
    """Groups that a token uses."""
    experts_per_group: PositiveInt = 2
    """Experts that a token uses in each of these."""

    @property
    def fixed_k(self) -> int:
        """Experts of every token."""
        return self.groups_per_token * self.experts_per_group

    def limits(self) -> dict[str, float | None]:
        """Return nothing: `check` has more to say."""
        return {}

    def check(self, moe: "MoEConfig") -> None:
        """Check the numbers of groups and experts against each other.

        Raises:
            ConfigError: groups are not equally large, or a token uses more than there are.
        """
        if moe.experts % self.num_groups:
            raise ConfigError(
                f"router.num_groups = {self.num_groups} does not divide num_experts = "
                f"{moe.experts} into equal groups: change either",
                key="router.num_groups",
            )
        for key, most, what in (
            ("groups_per_token", self.num_groups, "router.num_groups"),
            ("experts_per_group", moe.experts // self.num_groups, "the experts of a group,"),
        ):
            if getattr(self, key) > most:
                raise ConfigError(
                    f"router.{key} = {getattr(self, key)} is more than {what} = {most}: change "
                    f"either",
                    key=f"router.{key}",
                )

    def build(self, *, dim: int, num_experts: int) -> "HierarchicalRouter":
        """Build the router."""
        return HierarchicalRouter(self, dim=dim, num_experts=num_experts)


class HierarchicalRouter(Router):
    """Scores all groups and all experts for every token; the first A rows of its gate are the
    groups'."""

    def __init__(self, config: HierarchicalConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        self.gate = NoisyGate(dim, config.num_groups + num_experts)

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        clean, std = self.gate(x_TD)
        is_noisy = self.config.noise and context.training
        noisy = with_noise(clean, std, context) if is_noisy else clean
        clean_TA, clean_TAB = self.levels(clean)
        groups_TA, experts_TAB = self.levels(noisy)
        ids_TK = context.decide("expert_ids", lambda: self.select(groups_TA, experts_TAB, context))
        chosen_TAB = is_chosen(ids_TK, clean_TAB.flatten(1).shape[1]).view_as(experts_TAB)
        chosen_TA = chosen_TAB.any(-1)
        gates_TE = (
            softmax_within(groups_TA, chosen_TA)[:, :, None]
            * softmax_within(experts_TAB, chosen_TAB)
        ).flatten(1)
        weights_TK = scores_of(ids_TK, gates_TE)
        size = self.config.group_size(len(x_TD), context)
        amounts_GE = {"importance": in_groups(gates_TE, size).sum(1)}
        if is_noisy:
            std_TA, std_TAB = self.levels(std)
            chance_TA = chance_of_choice(groups_TA, clean_TA, std_TA, chosen_TA)
            chance_TAB = chance_of_choice(experts_TAB, clean_TAB, std_TAB, chosen_TAB)
            parts = (chance_TA, chance_TAB, chosen_TA)
            amounts_GE["load"] = hierarchical_load(*(in_groups(part, size) for part in parts))
        scores_TE = (clean_TA.softmax(-1)[:, :, None] * clean_TAB.softmax(-1)).flatten(1)
        losses = self.config.losses(amounts_GE, len(x_TD), context)
        return make_routing(clean_TAB.flatten(1), scores_TE, ids_TK, weights_TK, losses=losses)

    def levels(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Divide the columns of the gate into (T, A) of the groups and (T, A, B) of experts."""
        num_groups = self.config.num_groups
        return logits[:, :num_groups], logits[:, num_groups:].unflatten(1, (num_groups, -1))

    def select(self, groups_TA: Tensor, experts_TAB: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the experts of each token; padding has none."""
        group_ids_TP = top_k_ids(groups_TA, self.config.groups_per_token)
        expert_ids = top_k_ids(experts_TAB.flatten(0, 1), self.config.experts_per_group)
        chosen_TAB = is_chosen(expert_ids, experts_TAB.shape[2]).view_as(experts_TAB)
        chosen_TAB = chosen_TAB & is_chosen(group_ids_TP, groups_TA.shape[1])[:, :, None]
        if context.valid_T is not None:
            chosen_TAB = chosen_TAB & context.valid_T[:, None, None]
        return slots_of(chosen_TAB.flatten(1), self.config.fixed_k)


def softmax_within(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the softmax over the chosen entries of the last dim, 0 for others."""
    # Finite, as a row without any would else divide 0 by 0.
    return logits.masked_fill(~chosen, -1e30).softmax(-1).masked_fill(~chosen, 0)


def hierarchical_load(chance_GSA: Tensor, chance_GSAB: Tensor, chosen_GSA: Tensor) -> Tensor:
    """Return (G, E) Load_H = Load_primary,i Load_i(X_i)_j / |X_i| (eq. 14), X_i being i's tokens.

    Args:
        chance_GSA: (G, S, A) chance of each group of experts, for the S tokens of each set X.
        chance_GSAB: (G, S, A, B) chance of an expert within its group.
        chosen_GSA: (G, S, A) bool, the groups that each token uses.
    """
    tokens_GA = chosen_GSA.sum(1).clamp(min=1)
    load_GAB = chance_GSA.sum(1)[:, :, None] * chance_GSAB.sum(1) / tokens_GA[:, :, None]
    return load_GAB.flatten(1)
