"""The `model` section: a decoder language model of the GPT-2 or the Llama family."""

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe import MoEConfig
from dmoe.moe.routing import Samples, check_gate_threshold
from dmoe.ops import Activation


class ModelConfig(ConfigModel):
    """Sizes and choices of a decoder language model."""

    family: Literal["llama", "gpt2"] = "llama"
    """"llama": RoPE, RMSNorm, SwiGLU, no biases. "gpt2": learned positions, LayerNorm, GELU, biases
    and no grouped-query attention."""
    vocab_size: PositiveInt = 257
    """Token ids; 257 is bytes and an end-of-document token."""
    dim: PositiveInt = 256
    """Model width D."""
    num_layers: PositiveInt = 4
    """Blocks of attention and feed-forward network."""
    num_heads: PositiveInt = 4
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); null for as many as query heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; null for dim / num_heads."""
    ffn_dim: PositiveInt = 768
    """Hidden width of the dense feed-forward layers."""
    max_seq_len: PositiveInt = 1024
    """Longest sequence: the table of learned positions, and the limit of generation."""
    qk_norm: Literal["none", "head", "vector"] = "none"
    """RMSNorm of queries and keys, per head (Qwen3) or over the whole vector (OLMoE)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in every norm."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output matrix."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; maps back to the residual stream get it divided by
    sqrt(2 num_layers) (GPT-2)."""
    init_scale: PositiveFloat | None = None
    """Draw initial matrices, all but the embeddings, from a normal distribution of standard
    deviation sqrt(init_scale / inputs) that is cut at two of these (Switch: 1, and 0.1 for large
    sparse models); null for `init_std`."""
    moe: MoEConfig | None = None
    """Mixture-of-Experts layers; null for a dense model."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"dim = {self.dim} is not a multiple of num_heads = {self.num_heads}: change "
                f"either, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.kv_heads}"
            )
        if self.family == "llama" and self.width_of_head % 2:
            raise ValueError(
                f"head_dim = {self.width_of_head} is odd, but rotary positions turn pairs: make "
                f"head_dim (or dim / num_heads) even"
            )
        if self.moe is not None:
            self._check_experts(f"moe.{self.moe.leaf_path}", self.moe.leaf)
        if self.moe is not None and not self.moe_layers:
            raise ValueError(
                f"none of the num_layers = {self.num_layers} layers is a MoE layer with moe.every "
                f"= {self.moe.every} and moe.num_dense_layers = {self.moe.num_dense_layers}: lower "
                f"these, or set moe: null"
            )
        if self.moe is not None and self.moe.elastic is not None:
            try:
                self.moe.elastic.check_layers(len(self.moe_layers))
            except ConfigError as error:
                raise ConfigError(str(error), key=f"moe.elastic.{error.key}") from None
        if self.family == "gpt2" and (self.kv_heads != self.num_heads or self.qk_norm != "none"):
            raise ValueError(
                "family = gpt2 has neither num_kv_heads below num_heads nor qk_norm: unset them or "
                "use family: llama"
            )
        return self

    def _check_experts(self, path: str, moe: MoEConfig) -> None:
        if moe.is_grouped and moe.backend != "loop":
            of_expert = "infinite.block_size" if moe.infinite else "expert_ffn_dim"
            for key, width in (("dim", self.dim), (path + of_expert, moe.expert_width)):
                if width % 8:
                    raise ValueError(
                        f"{key} = {width} is not a multiple of 8, so the grouped GEMM cannot read "
                        f"rows of 16 bytes: change it, or set {path}backend: loop"
                    )
        if moe.expert_dtype == "fp8" and self.dim % 128:
            raise ConfigError(
                f"dim = {self.dim} is no multiple of 128, of which blocks in eight bits share a "
                f"scale: change it, or set {path}expert_dtype to same",
                key="dim",
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def width_of_head(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def activation(self) -> Activation:
        """The activation of every feed-forward network and expert."""
        return "swiglu" if self.family == "llama" else "gelu"

    def is_moe_layer(self, layer: int) -> bool:
        """Say whether layer `layer`, counted from 0, is a MoE layer."""
        return self.moe is not None and self.moe.is_moe_layer(layer)

    @property
    def moe_layers(self) -> list[int]:
        """The numbers of the MoE layers."""
        return [layer for layer in range(self.num_layers) if self.is_moe_layer(layer)]

    def k_of_layers(self, k: int | Sequence[int]) -> tuple[int, ...]:
        """Return a number of experts per token for each MoE layer.

        Args:
            k: one number for all MoE layers, or one for each, first layer first.

        Raises:
            ConfigError: the model has no experts, its router takes no such number, there is not one
                for each MoE layer, or one is below 1 or above the number of experts.
        """
        if self.moe is None:
            raise ConfigError(f"k = {k}, but the model is dense: leave k out")
        if self.moe.infinite is not None:
            raise ConfigError(
                f"k = {k}, but the model has a continuous space of experts: leave k out; samples "
                f"say how many experts a token draws from it"
            )
        if not self.moe.router.takes_k:
            raise ConfigError(
                f"k = {k}, but with the router {self.moe.router.name} the number of experts of a "
                f"token cannot be set: leave k out"
            )
        num_layers, num_experts = len(self.moe_layers), self.moe.experts
        k_L = (k,) * num_layers if isinstance(k, int) else tuple(k)
        if len(k_L) != num_layers:
            raise ConfigError(
                f"k = {list(k_L)} has {len(k_L)} numbers, but the model has {num_layers} MoE "
                f"layers: give one number, or one for each of them"
            )
        for k_l in k_L:
            if not 1 <= k_l <= num_experts:
                raise ConfigError(
                    f"k = {k_l} is not a number of experts from 1 to model.moe.num_experts = "
                    f"{num_experts}"
                )
        return k_L

    def check_samples(self, samples: Samples) -> None:
        """Check that a token can draw so many experts from a continuous space at inference.

        Raises:
            ConfigError: fewer than one, or the model has no such space, or "mean" where z has
                several means and no rule.
        """
        infinite = None if self.moe is None else self.moe.infinite
        if samples != "mean" and samples < 1:
            raise ConfigError(f"samples = {samples} is below 1: a token draws one expert at least")
        if infinite is None:
            raise ConfigError(
                f"samples = {samples}, but the model has no continuous space of experts "
                f"(model.moe.infinite): leave samples out"
            )
        if samples == "mean":
            infinite.check_mean("samples = mean")

    def check_gate_threshold(self, threshold: float) -> None:
        """Check that tokens may skip the experts whose score is below a share of their largest.

        Raises:
            ConfigError: the share is not in [0, 1), or no router of the model can skip.
        """
        check_gate_threshold(threshold)
        if not threshold:
            return
        if self.moe is None:
            raise ConfigError(
                f"gate threshold = {threshold}, but the model is dense: leave the threshold out"
            )
        router = self.moe.used_router
        if not router.takes_gate_threshold:
            raise ConfigError(
                f"gate threshold = {threshold}, but the router {router.name} does not "
                f"choose by score: leave the threshold out"
            )
