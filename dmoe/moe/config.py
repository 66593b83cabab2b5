"""What a layer of a Mixture of Experts is made of: the section `model.moe`."""

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.base import SparseLayer
from dmoe.moe.capacity import CapacityConfig
from dmoe.moe.dispatch import DispatchDtype, DispatchName
from dmoe.moe.elastic import ElasticConfig
from dmoe.moe.experts.eight_bits import check_eight_bits
from dmoe.moe.experts.zero_computation import ZeroComputationConfig
from dmoe.moe.infinite import (
    DeepNeuronLayer,
    InfiniteConfig,
    InfiniteSection,
    NeuronLayer,
    check_infinite,
)
from dmoe.moe.infinite.space import ExpertSpace
from dmoe.moe.losses import LossesConfig
from dmoe.moe.routers import RouterConfig, RouterSection, TopKConfig
from dmoe.ops import Activation, Backend, ExpertDtype
from dmoe.parallel import ParallelDims

_OF_NETWORKS = (
    "infinite",
    "recompute_experts",
    "expert_dropout",
    "dispatch",
    "dispatch_dtype",
    "expert_dtype",
)


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
    expert_layer: "MoEConfig | None" = None
    """Each expert is a MoE layer of its own, as this section says, to any depth; null for a network
    of `expert_ffn_dim`. There, what goes by sequences goes by the tokens of a micro-batch that came
    to the expert, and each loss is the sum over experts."""
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
    """How rows reach their experts; "auto" is "local" on one rank and "all_to_all" on several.
    "buffers" sends every expert as many rows as its capacity could be, full or not: more is sent,
    but nobody has to learn sizes first. It needs a `capacity`, which is counted as if each token
    had the most experts that it may have."""
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
    bfloat16 and float16 "triton" on an H100 or H200 with Triton 3.6, and "loop" on a CPU, as in
    float32 on one of AMD's with AVX-512 where experts have 64 rows on average; else "torch"."""

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
        has_width = self.expert_layer is None or self.num_shared_experts
        for key in ("num_experts", "expert_ffn_dim") if has_width else ("num_experts",):
            if getattr(self, key) is None:
                instead = "or a section infinite for a continuous space of experts"
                if self.expert_layer is not None and key == "expert_ffn_dim":
                    instead = f"of which num_shared_experts = {self.num_shared_experts} are made"
                raise ConfigError(f"{key} is missing: give a number, {instead}", key=key)
        return self

    @model_validator(mode="after")
    def _no_key_is_idle_with_layers_inside(self) -> "MoEConfig":
        inside = self.expert_layer
        if inside is None:
            return self
        of_networks = f"for networks, but the experts of num_experts = {self.num_experts}"
        idle = [(key, f"is {of_networks} are layers") for key in _OF_NETWORKS if self._gives(key)]
        if self.expert_ffn_dim is not None and not self.num_shared_experts:
            idle.append(("expert_ffn_dim", f"is {of_networks} are layers"))
        if self.infinite is None and self.router.stands_for_layer:
            idle.append(("router.name", f"= {self.router.name} is a layer of its own kind"))
        idle += [
            (f"expert_layer.{key}", "is for the layers of a model, not for those inside a layer")
            for key in ("every", "num_dense_layers", "elastic")
            if inside._gives(key)
        ]
        if inside.dispatch == "buffers":
            reason = (
                "= buffers has ranks send as many rows, and not as many come to each layer inside"
            )
            idle.append(("expert_layer.dispatch", reason))
        if inside.infinite is None and inside.router.mixes_sequences:
            reason = f"= {inside.router.name} mixes whole sequences, and only some tokens come here"
            idle.append(("expert_layer.router.name", reason))
        for key, reason in idle:
            raise ConfigError(f"{key} {reason}: leave it out, or expert_layer", key=key)
        return self

    def _gives(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

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
            for key, is_idle in (
                ("expert_dropout", self.expert_dropout != 0),
                ("dispatch", self.dispatch == "buffers"),
                ("dispatch_dtype", self.dispatch_dtype != "same"),
                ("expert_dtype", self.expert_dtype != "same"),
                ("recompute_experts", self.recompute_experts),
            ):
                if is_idle:
                    raise ConfigError(
                        f"{key} = {getattr(self, key)} is for experts that tokens are sent to by "
                        f"the ordinary layer, but router.name = {self.router.name} has a layer of "
                        f"its own: leave {key} out",
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
    def _buffers_have_a_size(self) -> "MoEConfig":
        if self.dispatch != "buffers":
            return self
        if self.capacity is None:
            raise ConfigError(
                "dispatch = buffers sends as many rows to each expert as its capacity, and there "
                "is none: add capacity, or set dispatch to auto",
                key="dispatch",
            )
        if self.dispatch_dtype != "same":
            raise ConfigError(
                f"dispatch_dtype = {self.dispatch_dtype} does not go with dispatch = buffers, "
                f"which sends rows as they are: leave out one of them",
                key="dispatch_dtype",
            )
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
    def leaf(self) -> "MoEConfig":
        """The section of the experts that are no layers: of the innermost level."""
        return self if self.expert_layer is None else self.expert_layer.leaf

    @property
    def leaf_path(self) -> str:
        """What leads from the keys of this section to those of `leaf`."""
        return "" if self.expert_layer is None else f"expert_layer.{self.expert_layer.leaf_path}"

    @property
    def num_leaves(self) -> int:
        """Experts of a layer that are no layers."""
        if self.expert_layer is None:
            return self.experts
        return self.num_networks * self.expert_layer.num_leaves

    @property
    def num_shards(self) -> int:
        """Experts of a layer that expert parallelism divides: none of single neurons."""
        if self.expert_layer is not None:
            return self.expert_layer.num_shards
        is_dense = self.infinite is not None and self.infinite.granularity == "neuron"
        return 0 if is_dense else self.used_router.num_shards(self.num_networks)

    @property
    def num_counted(self) -> int:
        """Length of the counts of slots that a layer reports: of its experts, or sets of them."""
        return self.used_router.num_counted(self.experts)

    @property
    def num_slots_counted(self) -> int:
        """Length of `stats.all_counts`: the counts of a layer, then those of the layers inside."""
        inside = self.expert_layer.num_slots_counted if self.expert_layer else 0
        return self.num_counted + self.num_networks * inside

    @property
    def is_grouped(self) -> bool:
        """Whether grouped GEMMs run the experts."""
        if self.expert_layer is not None:
            return self.expert_layer.is_grouped
        return bool(self.num_shards) and self.used_router.is_grouped

    @property
    def warning(self) -> str:
        """What the user must know before training or using a model, of all levels."""
        inside = self.expert_layer.warning if self.expert_layer else ""
        inside = inside.replace("model.moe.", "model.moe.expert_layer.")
        return " ".join(filter(None, (self.used_router.warning, inside)))

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
        inside = self.expert_layer.loss_weights() if self.expert_layer else {}
        inside = {f"within_{name}": weight for name, weight in inside.items()}
        return self.losses.weights() | self.used_router.loss_weights() | inside

    @property
    def needs_global_counts(self) -> bool:
        """Whether a loss depends on the slots that each expert has in the whole global batch."""
        inside = self.expert_layer is not None and self.expert_layer.needs_global_counts
        return self.losses.needs_global_counts or inside

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
        from dmoe.moe.layer import MoELayer  # layers are built from this section
        from dmoe.moe.nested import LayeredMoELayer

        if self.expert_layer is not None:
            return LayeredMoELayer(self, dim=dim, activation=activation, dims=dims)
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
