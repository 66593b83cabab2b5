"""Decoder language models of the GPT-2 and Llama families, dense or with MoE layers.

Shapes in comments: B batch, S sequence, T = B S tokens, D model dim, V vocabulary, L MoE layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.models.attention import (
    Attention,
    AttentionInputs,
    KVCache,
    packed_mask,
)
from dmoe.models.config import ModelConfig
from dmoe.models.norm import LayerNorm, RMSNorm
from dmoe.moe import MoEContext, MoEOutput, Samples, SparseLayer
from dmoe.moe.experts import FeedForward
from dmoe.ops import Linear, linear, rotary_angles
from dmoe.parallel import ParallelDims

Recompute = Literal["none", "selective", "full"]


class ModelOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """(B, S, V) in the compute dtype."""
    moe: list[MoEOutput]
    """One of each MoE layer, first layer first."""


@dataclass(frozen=True)
class ModelInputs:
    """Tokens and what is known of them."""

    tokens: Tensor
    """(B, S) int64."""
    positions: Tensor | None = None
    """(B, S) int64 place of each token in its document; None for 0, 1, ..."""
    document_ids: Tensor | None = None
    """(B, S) document of each token, negative for padding; with caches (B, length + S), of the
    tokens in the cache as well. None for one document a sequence."""


class Block(nn.Module):
    """Attention, then a feed-forward network or a MoE layer, each with a norm before it."""

    def __init__(self, config: ModelConfig, *, layer: int, dims: ParallelDims):
        super().__init__()
        self.attn_norm = _norm(config)
        self.attn = Attention(config)
        self.ffn_norm = _norm(config)
        self.moe: SparseLayer | None = None
        self.ffn: FeedForward | None = None
        if config.is_moe_layer(layer):
            assert config.moe is not None
            self.moe = config.moe.build(dim=config.dim, activation=config.activation, dims=dims)
        else:
            self.ffn = FeedForward(
                dim=config.dim,
                ffn_dim=config.ffn_dim,
                activation=config.activation,
                bias=config.family == "gpt2",
            )

    def forward(
        self,
        x: Tensor,
        attention: AttentionInputs,
        context: MoEContext,
        cache: KVCache | None = None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, MoEOutput | None]:
        """Map (B, S, D) to (B, S, D)."""
        if recompute == "selective":
            x = checkpoint(self.attend, x, attention, cache, use_reentrant=False)
        else:
            x = self.attend(x, attention, cache)
        return self.feed_forward(x, context)

    def attend(self, x: Tensor, attention: AttentionInputs, cache: KVCache | None) -> Tensor:
        """Add the attention of the normalised input."""
        return x + self.attn(self.attn_norm(x), attention, cache)

    def feed_forward(self, x: Tensor, context: MoEContext) -> tuple[Tensor, MoEOutput | None]:
        """Add the feed-forward network or the experts of the normalised input."""
        h = self.ffn_norm(x)
        if self.ffn is not None:
            return x + self.ffn(h), None
        assert self.moe is not None
        y_TD, output = self.moe(h.flatten(0, 1), context)
        return x + y_TD.view_as(x), output


class DecoderLM(nn.Module):
    """A decoder language model; build it with `dmoe.models.build_model`."""

    def __init__(self, config: ModelConfig, *, dims: ParallelDims, compute_dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.positions: nn.Embedding | None = None
        if config.family == "gpt2":
            self.positions = nn.Embedding(config.max_seq_len, config.dim)
        self.layers = nn.ModuleList(
            Block(config, layer=layer, dims=dims) for layer in range(config.num_layers)
        )
        self.norm = _norm(config)
        # A weight shared by two modules comes apart in `to_empty`, so a tied model has no head.
        self.lm_head: Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self._k_L: tuple[int, ...] | None = None
        self._gate_threshold = 0.0
        self._samples: Samples | None = None

    def set_k(self, k: int | Sequence[int] | None) -> None:
        """Set the experts per token, where a context does not give them.

        Args:
            k: one number for all MoE layers, one for each, or None for the router's own.

        Raises:
            ConfigError: a number below 1 or above the number of experts, or not one for each layer.
        """
        self._k_L = None if k is None else self.config.k_of_layers(k)

    @contextmanager
    def at_k(self, k: int | Sequence[int] | None) -> Iterator[None]:
        """Set the experts per token, as `set_k` does, for the length of a `with` block."""
        before = self._k_L
        self.set_k(k)
        try:
            yield
        finally:
            self._k_L = before

    def set_samples(self, samples: Samples | None) -> None:
        """Set the experts that a token draws from a continuous space at inference.

        Args:
            samples: the number, "mean" for the one at the mean of z, or None for what the
                configuration says.

        Raises:
            ConfigError: fewer than one, or the model has no such space or no such mean.
        """
        if samples is not None:
            self.config.check_samples(samples)
        self._samples = samples

    def set_gate_threshold(self, threshold: float) -> None:
        """Let each token skip the chosen experts whose score is below a share of its largest.

        For inference: a forward pass in training is then refused.

        Args:
            threshold: the share, in [0, 1); 0 to skip none.

        Raises:
            ConfigError: it is not in that range, or the model has no router that can skip.
        """
        self.config.check_gate_threshold(threshold)
        self._gate_threshold = threshold

    def forward(
        self,
        inputs: ModelInputs,
        context: MoEContext | None = None,
        *,
        caches: list[KVCache] | None = None,
        recompute: Recompute = "none",
        last_only: bool = False,
    ) -> ModelOutput:
        """Return the logits of every position and the outputs of the MoE layers.

        Args:
            inputs: tokens, positions, documents.
            context: what the MoE layers may know of the micro-batch; made from the inputs if None.
            caches: one KV cache a layer; the tokens then follow those in the cache.
            recompute: which activations are computed again in the backward pass: "none",
                "selective" (attention and its norm) or "full" (whole blocks). Routing is not.
            last_only: return the logits of the last position alone, (B, 1, V).
        """
        if context is None:
            context = MoEContext(
                seq_len=inputs.tokens.shape[1],
                valid_T=valid_tokens(inputs),
                token_ids_T=self._numbers(inputs, caches),
            )
        context = replace(context, vocab_ids_T=inputs.tokens.flatten())
        if self._samples is not None and not context.training:
            context = replace(context, samples=self._samples)
        if context.k_L is None and self._k_L is not None:
            context = replace(context, k_L=self._k_L)
        if self._gate_threshold:
            context = replace(context, gate_threshold=self._gate_threshold)
        x, attention = self.embed_tokens(inputs, caches)
        outputs: list[MoEOutput] = []
        for index, block in enumerate(self.layers):
            arguments = (
                x,
                attention,
                context.at_layer(len(outputs)),
                caches[index] if caches else None,
                recompute,
            )
            if recompute == "full":
                x, output = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, output = block(*arguments)
            if output is not None:
                outputs.append(output)
        if last_only:
            x = x[:, -1:]
        return ModelOutput(self.unembed(self.norm(x)), outputs)

    def embed_tokens(
        self, inputs: ModelInputs, caches: list[KVCache] | None
    ) -> tuple[Tensor, AttentionInputs]:
        """Return (B, S, D) embeddings and what the attention layers share."""
        tokens, config = inputs.tokens, self.config
        start = caches[0].length if caches else 0
        positions = _positions(inputs, caches)
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
            cos = sin = None
        else:
            cos, sin = rotary_angles(
                positions, config.width_of_head, config.rope_theta, self.compute_dtype
            )
        return x.to(self.compute_dtype), AttentionInputs(_mask(inputs, start), cos, sin)

    def _numbers(self, inputs: ModelInputs, caches: list[KVCache] | None) -> Tensor:
        """Return (T,) the numbers that noise at inference follows: the token and its place.

        So it depends on no batch: a sequence has the same noise alone, padded, cached or packed.
        """
        numbers = _positions(inputs, caches) * self.config.vocab_size + inputs.tokens
        return numbers.flatten()

    def unembed(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to the logits (B, S, V)."""
        if self.lm_head is None:
            return linear(x, self.embed.weight)
        return self.lm_head(x)

    @property
    def moe_layers(self) -> list[SparseLayer]:
        """The MoE layers, first layer first."""
        return [block.moe for block in self.blocks if block.moe is not None]

    @property
    def wide_parameters(self) -> set[str]:
        """The names of those that stay in float32 at least when weights are cast.

        A gate decides; and the gradient of a frequent token's embedding is a long sum.
        """
        modules = [module for layer in self.moe_layers for module in layer.wide_modules]
        modules += [table for table in (self.embed, self.positions) if table is not None]
        wide = {id(parameter) for module in modules for parameter in module.parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in wide}

    @property
    def blocks(self) -> list[Block]:
        """The layers, first layer first."""
        return cast(list[Block], list(self.layers))


def is_expert(name: str) -> bool:
    """Say whether a parameter of this name belongs to the routed experts, which ep divides."""
    return ".experts." in name


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies in nats, in float32 at least.

    Args:
        logits: (B, S, V).
        labels: (B, S) int64 token that follows each position; -100 does not count.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.flatten(0, 1).to(wide), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def valid_tokens(inputs: ModelInputs) -> Tensor | None:
    """Return (T,) bool, False for padding, or None where there is none."""
    if inputs.document_ids is None:
        return None
    valid_T = inputs.document_ids[:, -inputs.tokens.shape[1] :].flatten() >= 0
    return None if valid_T.all() else valid_T


def _positions(inputs: ModelInputs, caches: list[KVCache] | None) -> Tensor:
    """Return (B, S) the place of each token in its document."""
    if inputs.positions is not None:
        return inputs.positions
    start, tokens = caches[0].length if caches else 0, inputs.tokens
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    return positions.expand_as(tokens)


def _mask(inputs: ModelInputs, start: int) -> Tensor | None:
    """Return the attention mask; None where plain causal attention is meant."""
    document_ids, seq_len = inputs.document_ids, inputs.tokens.shape[1]
    if not start and (document_ids is None or bool((document_ids == 0).all())):
        return None
    if document_ids is None:
        document_ids = inputs.tokens.new_zeros(1, start + seq_len)
    return packed_mask(document_ids, seq_len)


def _norm(config: ModelConfig) -> nn.Module:
    norm = LayerNorm if config.family == "gpt2" else RMSNorm
    return norm(config.dim, config.norm_eps)
