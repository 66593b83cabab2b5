"""What a model costs, from its configuration: parameters, FLOPs, and what it keeps for backward.

Parameters are counted on the model itself, built on the meta device, so that no formula can fall
behind the code. Called by `dmoe estimate` and, for the utilisation, by the trainer.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dmoe.models import ModelConfig, Recompute, build_model
from dmoe.moe import MoEConfig
from dmoe.moe.routers import PeerConfig

# The first part of a name that matches decides: "attn.q_norm.weight" is a norm.
_KINDS = {
    "norm": "norms",
    ".w_z_FZ": "space",
    ".neurons.": "neurons",
    ".deeper_neurons.": "deeper_neurons",
    "embed.": "embedding",
    "positions.": "embedding",
    "lm_head.": "output",
    ".attn.": "attention",
    ".shared_experts.": "shared_experts",
    ".experts.": "experts",
    ".sub_keys": "sub_keys",
    ".zero_computation.": "zero_computation",
    ".router.": "router",
    ".ffn.": "dense_ffn",
}


class ParameterInfo(NamedTuple):
    """One parameter of a model."""

    layer: int | None
    """Number of its layer; None outside the layers."""
    kind: str
    """"embedding", "output", "attention", "dense_ffn", "experts", "shared_experts", "router",
    "sub_keys" of product keys, "zero_computation" or "norms"; of a continuous space of
    experts "space", its directions, and where it is not divided into experts "neurons" and
    "deeper_neurons"."""
    shape: torch.Size
    is_wide: bool = False
    """Whether it stays in float32 when others are cast, `DecoderLM.wide_parameters`."""
    depth: int = 0
    """Layers of experts that it is inside of, where experts are layers."""


def parameters(config: ModelConfig) -> Iterator[ParameterInfo]:
    """Yield every parameter once, as of one process; a tied output matrix is the embedding."""
    model = build_model(config, device="meta")
    wide = model.wide_parameters
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        kind = next(kind for part, kind in _KINDS.items() if part in name)
        yield ParameterInfo(layer, kind, parameter.shape, name in wide, name.count(".layers."))


def params_by_kind(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each kind that the model has."""
    counts: dict[str, int] = {}
    for info in parameters(config):
        counts[info.kind] = counts.get(info.kind, 0) + info.shape.numel()
    return counts


def num_params(config: ModelConfig) -> int:
    """Return the number of parameters."""
    return sum(params_by_kind(config).values())


def num_active_params(config: ModelConfig, k: float | None = None) -> int:
    """Return the number of parameters that a token uses, embedding and output matrix included.

    Of a continuous space of experts that is what samples use which have no neuron in common.

    Args:
        config: the `model` section.
        k: mean experts per token; that of training if None, as `MoEConfig.mean_k` gives it.
    """
    by_level: Counter[int] = Counter()
    for info in parameters(config):
        is_routed = info.kind in ("experts", "neurons", "deeper_neurons")
        by_level[info.depth + is_routed] += info.shape.numel()
    if config.moe is not None and k is None:
        k = config.moe.mean_k(len(config.moe_layers))
    return by_level.total() - inactive(config.moe, by_level, k)


def flops_per_token(
    config: ModelConfig, seq_len: int, *, training: bool = True, k: float | None = None
) -> int:
    """Return the floating-point operations of a token: 2 N + 4 L H d S forward, thrice in training.

    N is the active parameters in matrix products: without the embedding, which is looked up, and
    without norms and biases, but with the output matrix, tied or not. The attention term is that of
    PaLM (arXiv 2204.02311, appendix B), by which utilisations are compared: L layers of H heads of
    width d look at S positions, causal or not. Recomputation does not count. Of a continuous space
    what is computed counts: all single neurons, whatever is active, those between the first and the
    last layer for each sample, and the directions of the space for each sample.

    Args:
        config: the `model` section.
        seq_len: S, tokens of a sequence.
        training: count the backward pass as well.
        k: mean experts per token; that of training if None, as `MoEConfig.mean_k` gives it.
    """
    by_level: Counter[int] = Counter()
    for numbers in multiplied(config).values():
        by_level.update(numbers)
    if config.tie_embeddings:
        by_level[0] += config.vocab_size * config.dim
    attention = 4 * config.num_layers * config.num_heads * config.width_of_head * seq_len
    if k is None and config.moe is not None:
        k = config.moe.mean_passes(len(config.moe_layers), seq_len)
    used = by_level.total() - inactive(config.moe, by_level, k, seq_len)
    forward = 2 * used + attention
    return 3 * forward if training else forward


def multiplied(config: ModelConfig) -> dict[int | None, Counter[int]]:
    """Return the numbers that a token is multiplied with, were all experts its own, by layer.

    For each layer, and None for what is in no layer, by how many experts they are inside of. A
    matrix counts as often as it is used, and a tied output matrix does not.
    """
    by_layer: dict[int | None, Counter[int]] = {}
    leaf = config.moe.leaf if config.moe else None
    for layer, kind, shape, _, depth in parameters(config):
        if len(shape) > 1 and kind != "embedding":
            times = 1
            if kind == "sub_keys" and leaf:  # every head looks at them
                assert isinstance(leaf.router, PeerConfig)
                times = leaf.router.heads
            if kind in ("space", "deeper_neurons") and leaf and leaf.infinite:
                times = leaf.infinite.samples
            level = depth + (kind == "experts")
            by_layer.setdefault(layer, Counter())[level] += shape.numel() * times
    return by_layer


def inactive(
    moe: MoEConfig | None, by_level: Counter[int], k: float | None, seq_len: int | None = None
) -> int:
    """Return how many parameters a token does not use, as they are inside experts it has not.

    Args:
        moe: the `model.moe` section.
        by_level: parameters inside so many experts, of which each may be a layer.
        k: experts per token of the outermost level.
        seq_len: tokens of a sequence, to count rows rather than experts of the levels inside.
    """
    share, unused, level = 1.0, 0, 0
    while moe is not None:
        assert k is not None
        share *= moe.networks_of(k) / moe.num_networks
        level, moe = level + 1, moe.expert_layer
        unused += by_level[level] - round(by_level[level] * share)
        if moe is not None:
            router, num = moe.used_router, moe.experts
            k = router.nominal_k(num) if seq_len is None else router.passes(num, seq_len)
    return unused


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

    Balanced routing is assumed, and with elastic experts the largest k in every layer. Statistics,
    indices, packed masks and rotary angles are left out, and what RMSNorm keeps beside its input
    where it is not one kernel, as on CPUs.

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
        feed_forward = _feed_forward_width(config, layer, seq_len, exchanged=exchanged)
        routed = _recomputed_width(config, layer, seq_len)
        feed_forward, again = feed_forward - routed, max(again, routed)
        if recompute == "full":
            kept += config.dim
            again = max(again, attention + feed_forward + routed)
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


def _feed_forward_width(config: ModelConfig, layer: int, seq_len: int, *, exchanged: bool) -> int:
    """Return the numbers a token keeps in the feed-forward part of a layer and its norm."""
    norm = 2 * config.dim
    gated = config.activation == "swiglu"
    # Gate and up, silu of the gate, and their product; or what goes into GELU and comes out.
    dense = 4 if gated else 2
    if not config.is_moe_layer(layer):
        return norm + dense * config.ffn_dim
    assert config.moe is not None
    return norm + _moe_width(config, config.moe, seq_len, exchanged=exchanged)


def _moe_width(config: ModelConfig, moe: MoEConfig, seq_len: int, *, exchanged: bool) -> int:
    """Return the numbers a token keeps in a MoE layer, without what it reads."""
    gated = config.activation == "swiglu"
    shared = (4 if gated else 2) * _shared_width(moe)
    if moe.expert_layer is not None:
        # A row, what the layer keeps for it, and what it returns, for the gradient of the gate.
        inside = 2 * config.dim + _moe_width(config, moe.expert_layer, seq_len, exchanged=exchanged)
        return round(_passes(moe, seq_len) * inside) + shared
    if moe.infinite and not moe.num_shards:
        hidden, width = (2 if gated else 1) * moe.space_width, moe.space_width
        if moe.infinite.deep is None:
            # The pre-activations, and the activations under their mean mask.
            return hidden + width
        # The pre-activations of each layer and sample, what goes into the norm between layers and
        # comes out, and the mean of the samples.
        num_layers, samples = moe.infinite.deep.layers, moe.infinite.samples
        return samples * (num_layers * hidden + (num_layers - 1) * 2 * width) + width
    if not moe.is_grouped:
        return moe.used_router.kept_width(config.dim, exchanged=exchanged)
    # `expert_ffn` keeps its input, shared with the norm unless it came from afar or was rounded,
    # and gate and up.
    arrived = _passes(moe, seq_len) if exchanged else float(moe.dispatch_dtype != "same")
    if moe.dispatch == "buffers" and moe.capacity is not None:
        arrived = min(moe.capacity.factor * moe.most_k, moe.num_networks)
    routed = _routed_width(config, moe, seq_len) + round(arrived * config.dim)
    return routed + shared


def _shared_width(moe: MoEConfig) -> int:
    return moe.num_shared_experts * moe.expert_width if moe.num_shared_experts else 0


def _recomputed_width(config: ModelConfig, layer: int, seq_len: int) -> int:
    """Return the numbers a token does not keep in the experts, as they compute them again."""
    moe = config.moe
    if moe is None or not config.is_moe_layer(layer):
        return 0
    rows = 1.0
    while moe.expert_layer is not None:
        rows, moe = rows * _passes(moe, seq_len), moe.expert_layer
    return round(rows * _routed_width(config, moe, seq_len)) if moe.recompute_experts else 0


def _routed_width(config: ModelConfig, moe: MoEConfig, seq_len: int) -> int:
    """Return the numbers of a token before the activation, in all its routed experts."""
    gated = config.activation == "swiglu"
    return round(_passes(moe, seq_len) * (2 if gated else 1) * moe.expert_width)


def _passes(moe: MoEConfig, seq_len: int) -> float:
    """Return how often a token goes through a network, at most where that varies."""
    k = moe.elastic.k_max if moe.elastic else moe.used_router.passes(moe.experts, seq_len)
    return moe.networks_of(k)
