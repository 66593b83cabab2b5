"""The Mixture-of-Experts layer: route, apply capacity, dispatch, run the experts, combine.

Shapes: T tokens, D model dim, E experts, e local experts, K slots per token, R routed rows.
"""

from typing import NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.capacity import CapacityConfig, apply_capacity
from dmoe.moe.dispatch import DispatchName, build_dispatcher
from dmoe.moe.experts import FeedForward, GroupedExperts
from dmoe.moe.losses import LossesConfig, load_balance_loss, z_loss
from dmoe.moe.routers import RouterConfig, TopKConfig
from dmoe.moe.routing import MoEContext, Routing
from dmoe.moe.stats import MoEStats, measure
from dmoe.ops import Activation, Backend
from dmoe.parallel import ParallelDims, all_reduce_sum


class MoEConfig(ConfigModel):
    """The Mixture-of-Experts layers of a model."""

    every: PositiveInt = 1
    """Every n-th layer is a MoE layer: layer i (from 0) where i + 1 is a multiple of n."""
    num_dense_layers: NonNegativeInt = 0
    """The first layers that stay dense all the same (DeepSeekMoE: 1, DeepSeek-V3: 3)."""
    num_experts: PositiveInt
    """Routed experts of a layer."""
    expert_ffn_dim: PositiveInt
    """Hidden width of one expert."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that see every token, run as one network of this many times the expert width."""
    router: RouterConfig = Field(default_factory=TopKConfig)
    """How tokens choose experts."""
    capacity: CapacityConfig | None = None
    """Limit on the tokens of an expert; null for dropless."""
    losses: LossesConfig = Field(default_factory=LossesConfig)
    """Auxiliary losses."""
    dispatch: DispatchName = "auto"
    """How rows reach their experts; "auto" is "local" on one rank and "all_to_all" on several."""
    backend: Backend = "auto"
    """The grouped GEMM: "torch" is torch.nn.functional.grouped_mm, "loop" one product an expert;
    "auto" is "loop" on a CPU with fewer than 64 experts a rank, where it is the faster, and "torch"
    elsewhere."""

    @model_validator(mode="after")
    def _top_k_within_experts(self) -> "MoEConfig":
        if self.router.top_k > self.num_experts:
            raise ConfigError(
                f"router.top_k = {self.router.top_k} is more than num_experts = "
                f"{self.num_experts}: a token has that many experts at most; change either key",
                key="router.top_k",
            )
        return self

    def is_moe_layer(self, layer: int) -> bool:
        """Say whether layer `layer`, counted from 0, is a MoE layer."""
        return layer >= self.num_dense_layers and (layer + 1) % self.every == 0


class MoEOutput(NamedTuple):
    """What a layer returns beside y."""

    losses: dict[str, Tensor]
    """Unweighted auxiliary losses, in training only; a micro-batch's share of the global
    batch's."""
    stats: MoEStats
    """Sums for the metrics and the selection bias."""


class MoELayer(nn.Module):
    """Experts of which each token uses a few."""

    def __init__(
        self,
        config: MoEConfig,
        *,
        dim: int,
        activation: Activation = "swiglu",
        dims: ParallelDims | None = None,
    ):
        super().__init__()
        dims = dims or ParallelDims()
        self.config = config
        self.world_group = dims.world_group
        self.router = config.router.build(dim=dim, num_experts=config.num_experts)
        self.dispatcher = build_dispatcher(
            config.dispatch, num_experts=config.num_experts, dims=dims
        )
        self.experts = GroupedExperts(
            num_local=len(dims.local_experts(config.num_experts)),
            dim=dim,
            ffn_dim=config.expert_ffn_dim,
            activation=activation,
            backend=config.backend,
        )
        self.shared_experts: FeedForward | None = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.expert_ffn_dim
            self.shared_experts = FeedForward(dim=dim, ffn_dim=width, activation=activation)

    def forward(self, x_TD: Tensor, context: MoEContext) -> tuple[Tensor, MoEOutput]:
        """Return y_TD, without the residual, and the layer's losses and statistics."""
        routing = self.router(x_TD, context)
        served = routing
        if self.config.capacity is not None:
            served = apply_capacity(routing, self.config.capacity, context)
        rows, counts_e, handle = self.dispatcher.dispatch(x_TD, served)
        y_ND = self.experts(rows, counts_e)
        y_TD = self.dispatcher.combine(y_ND, handle)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        num_served = (served.expert_ids_TK >= 0).sum()
        return y_TD, MoEOutput(self.losses(routing, context), measure(routing, num_served, context))

    def losses(self, routing: Routing, context: MoEContext) -> dict[str, Tensor]:
        """Return the auxiliary losses that have a weight; none outside training."""
        config = self.config.losses
        weights = config.weights()
        losses: dict[str, Tensor] = {}
        if context.totals is None:
            return losses
        if "load_balance" in weights:
            losses["load_balance"] = load_balance_loss(
                routing,
                context.totals,
                scope=config.load_balance_scope,
                seq_len=context.seq_len,
                valid_T=context.valid_T,
                counts_E=self._global_counts(routing, context)
                if config.needs_global_counts
                else None,
            )
        if "z" in weights:
            losses["z"] = z_loss(routing.logits_TE, context.totals, context.valid_T)
        return losses

    def end_step(self, counts_E: Tensor) -> None:
        """Let the router adapt to a training step's slots per expert over the global batch."""
        self.router.end_step(counts_E)

    def _global_counts(self, routing: Routing, context: MoEContext) -> Tensor:
        if context.counts_LE is not None:
            return context.counts_LE[context.layer]
        # One micro-batch a rank: the ranks' micro-batches are the global batch.
        return context.decide(
            "global_counts", lambda: all_reduce_sum(routing.counts_E.clone(), self.world_group)
        )
