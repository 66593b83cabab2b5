"""The Mixture-of-Experts layer: route, apply capacity, dispatch, run the experts, combine.

Shapes: T tokens, D model dim, E experts, e local experts, K slots per token, R routed rows.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from dmoe.moe.base import SparseLayer
from dmoe.moe.capacity import apply_capacity
from dmoe.moe.config import MoEConfig
from dmoe.moe.dispatch import build_dispatcher
from dmoe.moe.experts import FeedForward, GroupedExperts
from dmoe.moe.experts.dropout import dropout_factors
from dmoe.moe.experts.zero_computation import ZeroComputationExperts
from dmoe.moe.losses import load_balance_loss, z_loss
from dmoe.moe.routers import Router
from dmoe.moe.routing import MoEContext, Routing
from dmoe.moe.stats import MoEOutput, Within, measure
from dmoe.ops import Activation, uses_kernels
from dmoe.parallel import ParallelDims, all_reduce_sum


class RoutedLayer(SparseLayer):
    """Sends tokens to experts, of whatever kind.

    Args:
        config: of the layer.
        dim: D.
        activation: of experts.
        dims: the layout; None for one process.
    """

    router: Router

    def __init__(
        self,
        config: MoEConfig,
        *,
        dim: int,
        activation: Activation = "swiglu",
        dims: ParallelDims | None = None,
    ):
        super().__init__()
        self.config = config
        self.world_group = dims.world_group if dims else None
        self.router = config.used_router.build(dim=dim, num_experts=config.experts)
        for module in self.router.modules():  # also those of a tree
            if isinstance(module, Router):
                module.backend = config.backend
        self.zero_computation: ZeroComputationExperts | None = None
        if config.zero_computation is not None:
            self.zero_computation = ZeroComputationExperts(
                config.zero_computation, dim=dim, first=config.num_networks
            )
        self.shared_experts: FeedForward | None = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.expert_width
            self.shared_experts = FeedForward(dim=dim, ffn_dim=width, activation=activation)

    def forward(self, x_TD: Tensor, context: MoEContext) -> tuple[Tensor, MoEOutput]:
        """Return y_TD, without the residual, and the layer's losses and statistics."""
        routing = self.router(x_TD, context)
        sent = served = self.zero_computation.without(routing) if self.zero_computation else routing
        if self.config.capacity is not None:
            by_triton = uses_kernels(self.config.backend, x_TD.device, x_TD.dtype)
            # Ranks agree on it: in training it is the first, outside all have as many slots.
            most_k = max(self.config.most_k, sent.expert_ids_TK.shape[1])
            served = apply_capacity(
                sent, self.config.capacity, context, most_k=most_k, by_triton=by_triton
            )
        y_TD, within = self.run_experts(x_TD, served, context)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        if self.zero_computation is not None:
            y_TD = y_TD + self.zero_computation(x_TD, routing)
        dropped = (sent.expert_ids_TK >= 0).sum() - (served.expert_ids_TK >= 0).sum()
        losses, stats = self.losses(routing, context), measure(routing, dropped, context)
        return y_TD, MoEOutput(losses | within.losses, stats.plus(within.sums))

    def run_experts(
        self, x_TD: Tensor, served: Routing, context: MoEContext
    ) -> tuple[Tensor, Within]:
        """Return each token's sum of its experts' outputs times gates, and what they report."""
        raise NotImplementedError

    def losses(self, routing: Routing, context: MoEContext) -> dict[str, Tensor]:
        """Return the auxiliary losses that have a weight; none outside training."""
        config = self.config.losses
        weights = config.weights()
        losses = dict(routing.losses)
        if context.totals is None:
            return losses
        if "load_balance" in weights:
            losses["load_balance"] = load_balance_loss(
                routing,
                context.totals,
                scope=config.load_balance_scope,
                seq_len=context.seq_len,
                valid_T=context.valid_T,
                choices=config.load_balance_choices,
                counts_E=self._global_counts(routing, context)
                if config.needs_global_counts
                else None,
            )
        if "z" in weights:
            losses["z"] = z_loss(routing.logits_TE, context.totals, context.valid_T)
        return losses

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 at least, whatever the precision of the model."""
        return self.router.wide_modules

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Let the router adapt to a training step."""
        zero = self.config.zero_computation
        if zero is not None:
            k = self.config.used_router.nominal_k(self.config.experts)
            counts_E = zero.relative_load(counts_E, k)
        self.router.end_step(counts_E, num_tokens, means)

    def _global_counts(self, routing: Routing, context: MoEContext) -> Tensor:
        if context.counts_LE is not None:
            return context.counts_LE[context.layer, : self.config.num_counted]
        # One micro-batch a rank: the ranks' micro-batches are the global batch.
        return context.decide(
            "global_counts", lambda: all_reduce_sum(routing.counts_E.clone(), self.world_group)
        )


class MoELayer(RoutedLayer):
    """Experts of which each token uses a few: networks, divided over the ranks of `ep`."""

    def __init__(
        self,
        config: MoEConfig,
        *,
        dim: int,
        activation: Activation = "swiglu",
        dims: ParallelDims | None = None,
    ):
        dims = dims or ParallelDims()
        super().__init__(config, dim=dim, activation=activation, dims=dims)
        self.dispatcher = build_dispatcher(
            config.dispatch,
            num_experts=config.num_networks,
            dims=dims,
            backend=config.backend,
            dtype=config.dispatch_dtype,
        )
        self.local_experts = dims.local_experts(config.num_networks)
        self.experts = GroupedExperts(
            num_local=len(self.local_experts),
            dim=dim,
            ffn_dim=config.expert_width,
            activation=activation,
            backend=config.backend,
            recompute=config.recompute_experts,
            dtype=config.expert_dtype,
        )

    def run_experts(
        self, x_TD: Tensor, served: Routing, context: MoEContext
    ) -> tuple[Tensor, Within]:
        """Dispatch rows to their experts, run these, and combine what they return."""
        rows, counts_e, handle = self.dispatcher.dispatch(x_TD, served)
        factors_RF = self._dropout(served, counts_e, context)
        y_ND = self.experts(rows, counts_e, factors_RF)
        return self.dispatcher.combine(y_ND, handle), Within({}, {})

    def _dropout(self, served: Routing, counts_e: Tensor, context: MoEContext) -> Tensor | None:
        """Return the factors of the neurons of each routed row, where some fall out."""
        rate = self.config.expert_dropout
        if not rate or not context.training:
            return None
        assert context.token_ids_T is not None, "dropout needs the tokens' numbers"
        # The numbers of the tokens go the way of the tokens; float64 holds them exactly.
        ids_T1 = context.token_ids_T[:, None].double()
        rows, _, _ = self.dispatcher.dispatch(ids_T1, served, exact=True)
        return dropout_factors(
            rate,
            rows.gather()[:, 0].long(),
            counts_e,
            first=self.local_experts.start,
            num_experts=self.config.experts,
            width=self.config.expert_width,
            context=context,
        )
