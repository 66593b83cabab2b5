"""A tree of routers: each expert of the outer router is itself a mixture, to any depth.

Paper: Jordan and Jacobs, 1994, "Hierarchical mixtures of experts and the EM algorithm".
Equations: y = sum_i g_i(x) sum_j g_ij(x) E_ij(x). As the inner mixtures read the same token, this
    is one layer over all leaves, with the product of gates, and so it is run: one dispatch, and the
    leaves are divided over `ep` like any experts.
Config: `model.moe.router: {name: nested, groups: 4, outer: {...}, inner: {...}}`.
Differs: gates may be sparse, by any router, and are trained by the model's loss, not by EM. Experts
    that are whole layers are `dmoe.moe.nested`, which defines this one.
Shapes: T tokens, G outer experts, I leaves of each, E = G I, K outer slots, J inner slots.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from dmoe.config.base import ConfigError
from dmoe.moe.routers.base import Router, RouterConfig, RouterSection
from dmoe.moe.routing import MoEContext, Routing, make_routing

if TYPE_CHECKING:  # the section that holds this one
    from dmoe.moe.config import MoEConfig


class NestedConfig(RouterSection):
    """Two levels of routing, of which the inner one may be nested again."""

    takes_k: ClassVar[bool] = False

    name: Literal["nested"]
    """Experts that are mixtures themselves."""
    groups: PositiveInt
    """Experts of the outer level; each holds num_experts / groups of the leaves, which are
    consecutive."""
    outer: RouterConfig
    """How a token chooses among the outer experts."""
    inner: RouterConfig
    """How it chooses within one; every outer expert has such a router of its own. What goes by
    sequences there goes by the tokens of a micro-batch that came to the expert."""

    @property
    def balances_itself(self) -> bool:  # type: ignore[override]
        """Whether both levels do: leaves are evenly loaded only if the outer experts are too."""
        return self.outer.balances_itself and self.inner.balances_itself

    @property
    def warning(self) -> str:  # type: ignore[override]
        """Those of both levels, by the keys that the levels have here."""
        return " ".join(
            section.warning.replace("model.moe.router.", f"model.moe.router.{level}.")
            for level, section in (("outer", self.outer), ("inner", self.inner))
            if section.warning
        )

    @property
    def fixed_k(self) -> int | None:
        """Leaves of every token, if both levels have a number."""
        outer, inner = self.outer.fixed_k, self.inner.fixed_k
        return None if outer is None or inner is None else outer * inner

    def limits(self) -> dict[str, float | None]:
        """Return nothing: `check` looks at each level."""
        return {}

    def check(self, moe: "MoEConfig") -> None:
        """Check each level against its own number of experts.

        Raises:
            ConfigError: the leaves do not divide into the outer experts, or a level does not fit.
        """
        if moe.experts % self.groups:
            raise ConfigError(
                f"router.groups = {self.groups} does not divide num_experts = {moe.experts} into "
                f"equal groups: change either",
                key="router.groups",
            )
        for level, num in (("outer", self.groups), ("inner", moe.experts // self.groups)):
            section: RouterSection = getattr(self, level)
            if section.stands_for_layer:
                raise ConfigError(
                    f"router.{level}.name = {section.name} is a layer of its own kind: choose a "
                    f"router that sends tokens to experts",
                    key=f"router.{level}.name",
                )
            tree = {"num_experts": num, "expert_ffn_dim": moe.expert_ffn_dim, "router": section}
            try:
                moe.model_copy(update={**tree, "zero_computation": None}).check_router()
            except ConfigError as error:
                inside = error.key.removeprefix("router.")
                message = str(error).replace("num_experts", f"the experts of router.{level}")
                raise ConfigError(message, key=f"router.{level}.{inside}") from None

    def nominal_k(self, num_experts: int) -> float:
        """Return the leaves per token by which a model is counted."""
        inner = self.inner.nominal_k(num_experts // self.groups)
        return self.outer.nominal_k(self.groups) * inner

    def most_k(self, num_experts: int) -> int:
        """Return the most leaves that a token may have."""
        return self.outer.most_k(self.groups) * self.inner.most_k(num_experts // self.groups)

    def loss_weights(self) -> dict[str, float]:
        """Return the weights of the losses of both levels, told apart by their names."""
        levels = (("outer", self.outer), ("inner", self.inner))
        return {f"{k}_{n}": w for k, level in levels for n, w in level.loss_weights().items()}

    def build(self, *, dim: int, num_experts: int) -> "NestedRouter":
        """Build the router."""
        return NestedRouter(self, dim=dim, num_experts=num_experts)


class NestedRouter(Router):
    """Routes to the outer experts, then within each of them the tokens that came to it."""

    def __init__(self, config: NestedConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.num_inner = num_experts // config.groups
        self.outer = config.outer.build(dim=dim, num_experts=config.groups)
        self.inner = nn.ModuleList(
            config.inner.build(dim=dim, num_experts=self.num_inner) for _ in range(config.groups)
        )

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 at least: the gates of all levels."""
        return [m for router in (self.outer, *self._inner()) for m in router.wide_modules]

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D), to leaves."""
        outer = self.outer(x_TD, context.inside("outer"))
        # Every expert's router is called, also without tokens: ranks gather its weights together.
        tokens, slots, routings = [], [], []
        for group, router in enumerate(self._inner()):
            token_R, slot_R = (outer.expert_ids_TK == group).nonzero().unbind(1)
            tokens.append(token_R)
            slots.append(slot_R)
            routings.append(router(x_TD[token_R], context.inside(f"inner {group}", token_R)))
        ids_TKJ, weights_TKJ = self._leaves(outer, tokens, slots, routings)
        scores_TGI = (outer.scores_TE / self.num_inner)[:, :, None].repeat(1, 1, self.num_inner)
        logits_TGI = outer.logits_TE[:, :, None].repeat(1, 1, self.num_inner)
        for group, (token_R, inner) in enumerate(zip(tokens, routings, strict=True)):
            place = (token_R, torch.full_like(token_R, group))
            scores_RI = outer.scores_TE[token_R, group, None] * inner.scores_TE
            scores_TGI = scores_TGI.index_put(place, scores_RI)
            logits_TGI = logits_TGI.index_put(place, inner.logits_TE, accumulate=True)
        return make_routing(
            logits_TGI.flatten(1),
            scores_TGI.flatten(1),
            ids_TKJ.flatten(1),
            weights_TKJ.flatten(1),
            self._sums(outer, routings),
            self._losses(outer, routings),
        )

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Let the routers of both levels adapt, each to its own tokens."""
        assert means is not None, "the slots of the outer experts"
        by_level: dict[str, dict[str, Tensor]] = {"outer": {}, "inner": {}}
        for name, mean_E in means.items():
            level, _, inside = name.partition("_")
            by_level[level][inside] = mean_E
        groups = self.config.groups
        slots_G = (by_level["outer"].pop("slots")[:groups] * num_tokens).round().long()
        outer = {name: mean_E[:groups] for name, mean_E in by_level["outer"].items()}
        self.outer.end_step(slots_G, num_tokens, outer)
        for group, router in enumerate(self._inner()):
            leaves = slice(group * self.num_inner, (group + 1) * self.num_inner)
            num = int(slots_G[group])
            if not num:  # a router that no token came to has nothing to adapt to
                continue
            # Means over all tokens become those over the tokens that came here.
            share = num_tokens / num
            inner = {name: share * mean_E[leaves] for name, mean_E in by_level["inner"].items()}
            router.end_step(counts_E[leaves], num, inner)

    def _inner(self) -> list[Router]:
        return cast(list[Router], list(self.inner))

    def _leaves(
        self, outer: Routing, tokens: list[Tensor], slots: list[Tensor], routings: list[Routing]
    ) -> tuple[Tensor, Tensor]:
        """Return (T, K, J) the leaves of each outer slot and the products of gates."""
        num_inner_slots = max(inner.expert_ids_TK.shape[1] for inner in routings)
        shape = (*outer.expert_ids_TK.shape, num_inner_slots)
        ids_TKJ = outer.expert_ids_TK.new_full(shape, -1)
        weights_TKJ = outer.weights_TK.new_zeros(shape)
        for group, (token_R, slot_R, inner) in enumerate(zip(tokens, slots, routings, strict=True)):
            ids_RJ = inner.expert_ids_TK
            leaf_RJ = torch.where(ids_RJ < 0, -1, ids_RJ + group * self.num_inner)
            gates_RJ = outer.weights_TK[token_R, slot_R, None] * inner.weights_TK
            place_J = torch.arange(ids_RJ.shape[1], device=ids_RJ.device)
            place = (token_R[:, None], slot_R[:, None], place_J)
            ids_TKJ[place] = leaf_RJ
            weights_TKJ = weights_TKJ.index_put(place, gates_RJ)
        return ids_TKJ, weights_TKJ

    def _sums(self, outer: Routing, routings: list[Routing]) -> dict[str, Tensor]:
        """Return the sums of both levels; those by outer expert are filled up to E."""
        fill = (0, self.num_experts - self.config.groups)
        pad = nn.functional.pad
        sums = {"outer_slots": pad(outer.counts_E.to(outer.scores_TE.dtype), fill)}
        sums |= {f"outer_{n}": pad(s, fill) if s.ndim else s for n, s in outer.sums.items()}
        for name in routings[0].sums:
            parts = [inner.sums[name] for inner in routings]
            joined = torch.cat(parts) if parts[0].ndim else torch.stack(parts).sum()
            sums[f"inner_{name}"] = joined
        return sums

    def _losses(self, outer: Routing, routings: list[Routing]) -> dict[str, Tensor]:
        losses = {f"outer_{name}": loss for name, loss in outer.losses.items()}
        for name in routings[0].losses:
            losses[f"inner_{name}"] = torch.stack([inner.losses[name] for inner in routings]).sum()
        return losses
