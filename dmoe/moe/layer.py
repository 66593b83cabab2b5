"""The Mixture-of-Experts layer: route, apply capacity, dispatch, run the experts, combine.

Shapes: T tokens, D model dim, E experts, e local experts, K slots per token, R routed rows.
"""

from collections.abc import Mapping

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.base import SparseLayer
from dmoe.moe.capacity import CapacityConfig, apply_capacity
from dmoe.moe.dispatch import DispatchDtype, DispatchName, build_dispatcher
from dmoe.moe.elastic import ElasticConfig
from dmoe.moe.experts import FeedForward, GroupedExperts
from dmoe.moe.experts.dropout import dropout_factors
from dmoe.moe.experts.eight_bits import check_eight_bits
from dmoe.moe.experts.zero_computation import ZeroComputationConfig, ZeroComputationExperts
from dmoe.moe.infinite import (
    DeepNeuronLayer,
    InfiniteConfig,
    InfiniteSection,
    NeuronLayer,
    check_infinite,
)
from dmoe.moe.infinite.space import ExpertSpace
from dmoe.moe.losses import LossesConfig, load_balance_loss, z_loss
from dmoe.moe.routers import Router, RouterConfig, RouterSection, TopKConfig
from dmoe.moe.routing import MoEContext, Routing
from dmoe.moe.stats import MoEOutput, measure
from dmoe.ops import Activation, Backend, ExpertDtype, uses_kernels
from dmoe.parallel import ParallelDims, all_reduce_sum


class MoEConfig(ConfigModel):
    """The Mixture-of-Experts layers of a model."""

    every: PositiveInt = 1
    """Every n-th layer is a MoE layer: layer i (from 0) where i + 1 is a multiple of n."""
    num_dense_layers: NonNegativeInt = 0
    """The first layers that stay dense all the same (DeepSeekMoE: 1, DeepSeek-V3: 3)."""
    num_experts: PositiveInt | None = None
    """Routed experts of a layer; null where `infinite` has a width of its own."""
    expert_ffn_dim: PositiveInt | None = None
    """Hidden width of one expert; null where `infinite` has a width of its own."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that see every token, run as one network of this many times the expert width."""
    zero_computation: ZeroComputationConfig | None = None
    """Experts without a network, beside the others; null for none."""
    router: RouterConfig = Field(default_factory=TopKConfig)
    """How tokens choose experts; not used with `infinite`, which has a router of its own."""
    infinite: InfiniteConfig | None = None
    """A continuous space of experts in place of a number of them; null for `num_experts`."""
    elastic: ElasticConfig | None = None
    """Train with a varying number of experts per token; null for the router's own number."""
    capacity: CapacityConfig | None = None
    """Limit on the tokens of an expert; null for dropless."""
    losses: LossesConfig = Field(default_factory=LossesConfig)
    """Auxiliary losses; unless it is given, the load-balancing loss is off with `infinite` and with
    routers that have other means."""
    recompute_experts: bool = False
    """Compute the first product of routed experts again in the backward pass: of their work only
    the input is then kept, for 22% more FLOPs of theirs (gated; else 17%)."""
    expert_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the neurons of each routed expert that fall out for a token in training (Switch
    fine-tunes with 0.4). The experts then run one after the other, whatever the backend."""
    dispatch: DispatchName = "auto"
    """How rows reach their experts; "auto" is "local" on one rank and "all_to_all" on several."""
    dispatch_dtype: DispatchDtype = "same"
    """How rows are sent to their experts: "same" as they are, "fp8" in eight bits, as numbers in
    e4m3 and a power of two for each 128 of them. What experts return, and all gradients, are sent
    as they are. Rows for experts of the same rank are rounded alike, on one rank too."""
    expert_dtype: ExpertDtype = "same"
    """What routed experts multiply in: "same" as the rest, "fp8" e4m3 numbers with a power of two
    for each 128 of a row and each 128 x 128 of a weight, summed in float32: forward and for the
    gradient of their input. Widths must be multiples of 128. With `backend: triton` it needs a GPU
    of compute capability 9 (H100, H200); "torch" and "loop" compute the same numbers, slowly."""
    backend: Backend = "auto"
    """What routed experts run on: "torch" is torch.nn.functional.grouped_mm, "loop" one expert
    after the other, "triton" the kernels of `kernels/`, which serve spaces of neurons too,
    "megablocks" the grouped GEMM of the package of that name. "auto" takes the fastest known: in
    bfloat16 and float16 "triton" on an H100 or H200, if it is installed, and "loop" on a CPU; else
    "torch"."""

    @model_validator(mode="after")
    def _balance_loss_where_it_is_needed(self) -> "MoEConfig":
        given = "load_balance_weight" in self.losses.model_fields_set
        if self.used_router.balances_itself and not given:
            losses = self.losses.model_copy(update={"load_balance_weight": 0.0})
            # The section is frozen for those who use it, and this is still its making.
            object.__setattr__(self, "losses", losses)
        return self

    @model_validator(mode="after")
    def _has_experts(self) -> "MoEConfig":
        if self.infinite is not None:
            check_infinite(self.infinite, self)
            return self
        for key in ("num_experts", "expert_ffn_dim"):
            if getattr(self, key) is None:
                raise ConfigError(
                    f"{key} is missing: give a number, or a section infinite for a continuous "
                    f"space of experts",
                    key=key,
                )
        return self

    @model_validator(mode="after")
    def _k_within_experts(self) -> "MoEConfig":
        if self.zero_computation is not None:
            self.zero_computation.check(self)
        if self.infinite is None:
            self.check_router()
        return self

    def check_router(self) -> None:
        """Check the router against the experts.

        Raises:
            ConfigError: a token may have more experts than there are, or what the router says.
        """
        limits = self.router.limits()
        if self.elastic is not None:
            k_max, k_ideal = self.elastic.k_max, self.elastic.k_ideal
            limits |= {"elastic.k_max": k_max, "elastic.k_ideal": k_ideal}
        for key, k in limits.items():
            if k is not None and k > self.experts:
                raise ConfigError(
                    f"{key} = {k} is more than num_experts = {self.experts}: a token has that "
                    f"many experts at most; change either key",
                    key=key,
                )
        self.router.check(self)

    @model_validator(mode="after")
    def _sends_tokens(self) -> "MoEConfig":
        if self.infinite is None and self.router.stands_for_layer:
            for key, default in (
                ("expert_dropout", 0.0),
                ("dispatch_dtype", "same"),
                ("expert_dtype", "same"),
                ("recompute_experts", False),
            ):
                if (given := getattr(self, key)) != default:
                    raise ConfigError(
                        f"{key} = {given} is for experts that tokens are sent to by the ordinary "
                        f"layer, but router.name = {self.router.name} has a layer of its own: "
                        f"leave {key} out",
                        key=key,
                    )
        if self.recompute_experts and self.expert_dropout:
            raise ConfigError(
                f"recompute_experts does not go with expert_dropout = {self.expert_dropout:g}: "
                f"experts whose neurons fall out keep all; leave one of them out",
                key="recompute_experts",
            )
        check_eight_bits(self)
        return self

    @model_validator(mode="after")
    def _router_is_elastic(self) -> "MoEConfig":
        elastic, router = self.elastic, self.router
        if elastic is None:
            return self
        for key, holds, reason in (
            ("elastic", not router.takes_k, "there the number of experts of a token is not set"),
            ("elastic", router.fixed_k is None, "it gives each token a k of its own"),
            (
                "elastic.k_ideal",
                elastic.k_ideal is not None and not router.takes_gate_threshold,
                "it does not choose by score, so there are no best to draw from",
            ),
            (
                "elastic.normalize",
                elastic.normalize is not None and not hasattr(router, "normalize"),
                "its gates have no such choice",
            ),
        ):
            if holds:
                raise ConfigError(
                    f"{key} does not go with router.name = {router.name}: {reason}; leave {key} "
                    f"out, or choose router.name: top_k",
                    key=key,
                )
        return self

    @property
    def experts(self) -> int:
        """Experts of a layer, as routing counts them; its blocks or neurons with `infinite`."""
        if self.infinite is None:
            return self.num_networks + (self.zero_computation.num if self.zero_computation else 0)
        if self.infinite.granularity == "block":
            return self.space_width // self.expert_width
        return self.space_width * len(self.infinite.fractions)

    @property
    def num_networks(self) -> int:
        """Experts of a layer that are networks: without those of `zero_computation`."""
        if self.infinite is not None:
            return self.experts
        assert self.num_experts is not None
        return self.num_experts

    def networks_of(self, k: float) -> float:
        """Return how many of k experts of a token are networks, on average."""
        zero = self.zero_computation
        if zero is None:
            return k
        if zero.target_k is None:
            return k * self.num_networks / self.experts
        return k * zero.target_k / self.used_router.nominal_k(self.experts)

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert: of a continuous space that of a block, or 1."""
        if self.infinite is None:
            width = self.expert_ffn_dim
        elif self.infinite.granularity == "block":
            width = self.infinite.block_size or self.expert_ffn_dim
        else:
            width = 1
        assert width is not None
        return width

    @property
    def space_width(self) -> int:
        """Neurons of one layer of a continuous space of experts."""
        assert self.infinite is not None
        if self.infinite.ffn_dim is not None:
            return self.infinite.ffn_dim
        assert self.num_experts is not None
        assert self.expert_ffn_dim is not None
        return self.num_experts * self.expert_ffn_dim

    @property
    def num_shards(self) -> int:
        """Experts of a layer that expert parallelism divides: none of single neurons."""
        is_dense = self.infinite is not None and self.infinite.granularity == "neuron"
        return 0 if is_dense else self.used_router.num_shards(self.num_networks)

    @property
    def num_counted(self) -> int:
        """Length of the counts of slots that a layer reports: of its experts, or sets of them."""
        return self.used_router.num_counted(self.experts)

    @property
    def is_grouped(self) -> bool:
        """Whether grouped GEMMs run the experts."""
        return bool(self.num_shards) and self.used_router.is_grouped

    @property
    def used_router(self) -> RouterSection:
        """The router as it is built: with the normalisation that `elastic` asks for."""
        if self.infinite is not None:
            return InfiniteSection(infinite=self.infinite)
        if self.elastic is None or self.elastic.normalize is None:
            return self.router
        return self.router.model_copy(update={"normalize": self.elastic.normalize})

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each auxiliary loss in the training loss, without the zeros."""
        return self.losses.weights() | self.used_router.loss_weights()

    @property
    def most_k(self) -> int:
        """The most experts that a token has in training."""
        return self.elastic.k_max if self.elastic else self.used_router.most_k(self.experts)

    def mean_k(self, num_layers: int) -> float:
        """Return the mean number of experts per token in training, over `num_layers` MoE layers."""
        if self.elastic is not None:
            return self.elastic.mean_k(num_layers)
        return self.used_router.nominal_k(self.experts)

    def mean_passes(self, num_layers: int, seq_len: int) -> float:
        """Return how often a row goes through an expert in training, per token and MoE layer."""
        if self.elastic is not None:
            return self.elastic.mean_k(num_layers)
        return self.used_router.passes(self.experts, seq_len)

    def build(
        self, *, dim: int, activation: Activation, dims: ParallelDims | None = None
    ) -> SparseLayer:
        """Build a layer; it holds this rank's share of the experts."""
        dims = dims or ParallelDims()
        if self.infinite is None or self.infinite.granularity == "block":
            build = self.used_router.build_layer
            layer = build(self, dim=dim, activation=activation, dims=dims)
            return layer or MoELayer(self, dim=dim, activation=activation, dims=dims)
        neurons = NeuronLayer if self.infinite.deep is None else DeepNeuronLayer
        built = neurons(self.infinite, width=self.space_width, dim=dim, activation=activation)
        for module in built.modules():
            if isinstance(module, ExpertSpace):
                module.backend = self.backend
        return built

    def is_moe_layer(self, layer: int) -> bool:
        """Say whether layer `layer`, counted from 0, is a MoE layer."""
        return layer >= self.num_dense_layers and (layer + 1) % self.every == 0


class MoELayer(SparseLayer):
    """Experts of which each token uses a few."""

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
        dims = dims or ParallelDims()
        self.config = config
        self.world_group = dims.world_group
        self.router = config.used_router.build(dim=dim, num_experts=config.experts)
        self.router.backend = config.backend
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
            served = apply_capacity(sent, self.config.capacity, context, by_triton=by_triton)
        rows, counts_e, handle = self.dispatcher.dispatch(x_TD, served)
        factors_RF = self._dropout(served, counts_e, context)
        y_ND = self.experts(rows, counts_e, factors_RF)
        y_TD = self.dispatcher.combine(y_ND, handle)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        if self.zero_computation is not None:
            y_TD = y_TD + self.zero_computation(x_TD, routing)
        dropped = (sent.expert_ids_TK >= 0).sum() - (served.expert_ids_TK >= 0).sum()
        return y_TD, MoEOutput(self.losses(routing, context), measure(routing, dropped, context))

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
            return context.counts_LE[context.layer]
        # One micro-batch a rank: the ranks' micro-batches are the global batch.
        return context.decide(
            "global_counts", lambda: all_reduce_sum(routing.counts_E.clone(), self.world_group)
        )
