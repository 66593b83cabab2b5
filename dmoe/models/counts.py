"""What a model costs, from its configuration: parameters, FLOPs, and what it keeps for backward.

Parameters are counted on the model itself, built on the meta device, so that no formula can fall
behind the code. Called by `dmoe estimate` and, for the utilisation, by the trainer.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dmoe.models import ModelConfig, Recompute, build_model

# The first part of a name that matches decides: "attn.q_norm.weight" is a norm.
_KINDS = {
    "norm": "norms",
    "embed.": "embedding",
    "positions.": "embedding",
    "lm_head.": "output",
    ".attn.": "attention",
    ".shared_experts.": "shared_experts",
    ".experts.": "experts",
    ".router.": "router",
    ".ffn.": "dense_ffn",
}


class ParameterInfo(NamedTuple):
    """One parameter of a model."""

    layer: int | None
    """Number of its layer; None outside the layers."""
    kind: str
    """"embedding", "output", "attention", "dense_ffn", "experts", "shared_experts", "router" or
    "norms"."""
    shape: torch.Size


def parameters(config: ModelConfig) -> Iterator[ParameterInfo]:
    """Yield every parameter once, as of one process; a tied output matrix is the embedding."""
    for name, parameter in build_model(config, device="meta").named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        kind = next(kind for part, kind in _KINDS.items() if part in name)
        yield ParameterInfo(layer, kind, parameter.shape)


def params_by_kind(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each kind that the model has."""
    counts: dict[str, int] = {}
    for _, kind, shape in parameters(config):
        counts[kind] = counts.get(kind, 0) + shape.numel()
    return counts


def num_params(config: ModelConfig) -> int:
    """Return the number of parameters."""
    return sum(params_by_kind(config).values())


def num_active_params(config: ModelConfig, k: int | None = None) -> int:
    """Return the number of parameters that a token uses, embedding and output matrix included.

    Args:
        config: the `model` section.
        k: experts per token; the router's `top_k` if None.
    """
    counts = params_by_kind(config)
    return sum(counts.values()) - _inactive(config, counts.get("experts", 0), k)


def flops_per_token(config: ModelConfig, seq_len: int, *, training: bool = True) -> int:
    """Return the floating-point operations of a token: 2 N + 4 L H d S forward, thrice in training.

    N is the active parameters in matrix products: without the embedding, which is looked up, and
    without norms and biases, but with the output matrix, tied or not. The attention term is that of
    PaLM (arXiv 2204.02311, appendix B), by which utilisations are compared: L layers of H heads of
    width d look at S positions, causal or not. Recomputation does not count.

    Args:
        config: the `model` section.
        seq_len: S, tokens of a sequence.
        training: count the backward pass as well.
    """
    matrices = experts = 0
    for _, kind, shape in parameters(config):
        if len(shape) > 1 and kind != "embedding":
            matrices += shape.numel()
            experts += shape.numel() if kind == "experts" else 0
    if config.tie_embeddings:
        matrices += config.vocab_size * config.dim
    attention = 4 * config.num_layers * config.num_heads * config.width_of_head * seq_len
    forward = 2 * (matrices - _inactive(config, experts)) + attention
    return 3 * forward if training else forward


def _inactive(config: ModelConfig, experts: int, k: int | None = None) -> int:
    """Return how many of the parameters of the routed experts a token does not use."""
    if config.moe is None:
        return 0
    k = config.moe.router.top_k if k is None else k
    return experts * (config.moe.num_experts - k) // config.moe.num_experts


class Activations(NamedTuple):
    """Bytes of a micro-batch between its forward and its backward pass."""

    kept: int
    """Kept by the layers from the forward pass."""
    recomputed: int
    """Computed again in the backward pass, in the largest layer."""
    logits: int
    """Logits, the softmax that the loss keeps, and its gradient."""


def activations(
    config: ModelConfig,
    *,
    num_tokens: int,
    seq_len: int,
    dtype: torch.dtype,
    recompute: Recompute,
    masked: bool,
    exchanged: bool,
) -> Activations:
    """Return what the forward pass of `num_tokens` tokens on one rank keeps for the backward pass.

    Balanced routing is assumed. Statistics, indices and rotary angles are left out, and what
    RMSNorm keeps beside its input where it is not one kernel, as on CPUs.

    Args:
        config: the `model` section.
        num_tokens: tokens of the micro-batch.
        seq_len: tokens of a sequence.
        dtype: of activations.
        recompute: what is computed again.
        masked: documents in a sequence are kept apart, so attention has a mask.
        exchanged: the rows of the experts arrive from other ranks.
    """
    kept, again = 2 * config.dim, 0  # The input of the last norm and that of the output matrix.
    for layer in range(config.num_layers):
        attention = _attention_width(config) + (seq_len if masked else 0)
        feed_forward = _feed_forward_width(config, layer, exchanged=exchanged)
        if recompute == "full":
            kept += config.dim
            again = max(again, attention + feed_forward)
        elif recompute == "selective":
            kept += config.dim + feed_forward
            again = max(again, attention)
        else:
            kept += attention + feed_forward
    # The loss is computed in float32 whatever the logits are.
    logits = num_tokens * config.vocab_size * (dtype.itemsize + 2 * max(4, dtype.itemsize))
    bytes_per_width = num_tokens * dtype.itemsize
    return Activations(bytes_per_width * kept, bytes_per_width * again, logits)


def _attention_width(config: ModelConfig) -> int:
    """Return the numbers a token keeps in attention and its norm."""
    queries = config.num_heads * config.width_of_head
    projected = queries + 2 * config.kv_heads * config.width_of_head
    norm = 2 * config.dim  # Its input and its output.
    if config.family == "gpt2":
        return norm + projected + queries
    # Turned queries and repeated, turned keys, and the output; the values are repeated too, or else
    # they are part of the projection, which stays whole for them as it does for query norms.
    grouped = config.kv_heads != config.num_heads
    width = norm + 3 * queries + (queries if grouped else 0)
    return width + (projected if not grouped or config.qk_norm != "none" else 0)


def _feed_forward_width(config: ModelConfig, layer: int, *, exchanged: bool) -> int:
    """Return the numbers a token keeps in the feed-forward part of a layer and its norm."""
    norm = 2 * config.dim
    gated = config.activation == "swiglu"
    # Gate and up, silu of the gate, and their product; or what goes into GELU and comes out.
    dense = 4 if gated else 2
    if not config.is_moe_layer(layer):
        return norm + dense * config.ffn_dim
    moe = config.moe
    assert moe is not None
    # `expert_ffn` keeps its input, shared with the norm unless it came from afar, and gate and up.
    routed = moe.router.top_k * (2 if gated else 1) * moe.expert_ffn_dim
    arrived = moe.router.top_k * config.dim if exchanged else 0
    return norm + routed + arrived + dense * moe.num_shared_experts * moe.expert_ffn_dim
