"""The memory that a rank takes, by what it is for: arithmetic on a model without weights."""

from dataclasses import asdict, dataclass
from math import prod
from typing import NamedTuple

from dmoe.engine.zero_config import deepspeed_settings
from dmoe.models.counts import ParameterInfo, activations, parameters
from dmoe.models.precision import COMPUTE_DTYPES
from dmoe.parallel import ParallelDims
from dmoe.parallel.placement import expert_shard_dim
from dmoe.trainer.config import Config

_NUM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank by what they are for, each at its most; their sum is a bound."""

    parameters: int
    """Master weights: this rank's share."""
    compute_weights: int
    """Weights in the compute dtype, gathered from other ranks or cast from the masters."""
    gradients: int
    """Those that this rank keeps, and DeepSpeed's lasting buffers for them."""
    reduction: int
    """Gradients on their way to the ranks that keep them: of a layer, or in DeepSpeed's buckets."""
    optimizer: int
    """Two moments of AdamW."""
    activations: int
    """What the layers keep of a micro-batch, and compute again at one time."""
    logits: int
    """Logits, their softmax and its gradient."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(asdict(self).values())


def memory_of_a_rank(config: Config, dims: ParallelDims) -> Memory:
    """Return the memory of the fullest rank; what DeepSpeed offloads to the host counts as well."""
    train = config.train
    dtype = COMPUTE_DTYPES[config.engine.precision]
    size, master_size = dtype.itemsize, max(4, dtype.itemsize)
    weights = [_place(parameter, config, dims) for parameter in parameters(config.model)]
    # What DeepSpeed shards, and what dmoe does; the latter is all for the native engine.
    given = [weight for weight in weights if weight.by_deepspeed]
    own = [weight for weight in weights if not weight.by_deepspeed]
    masters = master_size * sum(weight.share for weight in weights)
    # A layer's gradients are computed in the compute dtype and widened to be summed over ranks.
    on_their_way = _largest_layers([weight for weight in own if weight.sharded])
    buffers = _deepspeed_buffers(config, given)
    kept = activations(
        config.model,
        num_tokens=train.micro_batch_size * train.seq_len,
        seq_len=train.seq_len,
        dtype=dtype,
        recompute=train.recompute,
        masked=config.data.mask_documents,
        exchanged=dims.ep > 1,
    )
    return Memory(
        parameters=masters,
        compute_weights=size * _compute_weights(config, own) + buffers.weights,
        gradients=masters + buffers.gradients,
        reduction=(size + master_size) * on_their_way + buffers.reduction,
        optimizer=_NUM_MOMENTS * masters,
        activations=kept.kept + kept.recomputed,
        logits=kept.logits,
    )


class _Buffers(NamedTuple):
    """Bytes that DeepSpeed holds besides a rank's share of masters, gradients and moments."""

    weights: int = 0
    gradients: int = 0
    reduction: int = 0


def _deepspeed_buffers(config: Config, given: list["_Weight"]) -> _Buffers:
    """Return what DeepSpeed 0.19 allocates, as read in its sources and measured."""
    if not given:
        return _Buffers()
    engine, size = config.engine, COMPUTE_DTYPES[config.engine.precision].itemsize
    whole, share = (sum(getattr(weight, key) for weight in given) for key in ("whole", "share"))
    settings = deepspeed_settings(
        stage=engine.zero_stage,
        precision=engine.precision,
        extra=engine.deepspeed,
        num_elements=whole,
    )
    bucket = min(whole, int(settings["zero_optimization"]["reduce_bucket_size"]))
    if engine.zero_stage == 3:
        # By default it keeps up to a billion gathered elements until they have gone backward. The
        # bucket is float32, and lasts.
        live = int(settings["zero_optimization"].get("stage3_max_live_parameters", 10**9))
        return _Buffers(size * (share + min(whole, live)), 4 * bucket, size * bucket)
    in_buckets = size * bucket + (4 * bucket if size < 4 else 0)
    if engine.zero_stage == 2:
        return _Buffers(size * whole, 0, in_buckets)
    # Stage 1 keeps all gradients until the last micro-batch; the optimizer that bfloat16 has there
    # keeps their float32 sums for good, and the gradients themselves beside them.
    if engine.precision == "bf16":
        return _Buffers(size * whole, 4 * (whole - share) + size * whole, in_buckets)
    return _Buffers(size * whole, 0, in_buckets + size * whole)


class _Weight(NamedTuple):
    """One parameter as the fullest rank sees it, in numbers of elements."""

    parameter: ParameterInfo
    whole: int
    """What the rank computes with: of the experts, its own."""
    share: int
    """What of that the rank owns."""
    sharded: bool
    """Whether it owns less than it computes with, and gathers the rest."""
    by_deepspeed: bool
    """Whether DeepSpeed cuts it, flattened."""


def _place(parameter: ParameterInfo, config: Config, dims: ParallelDims) -> _Weight:
    """Place a parameter as the engine does: a dim is cut into equal pieces, rounded up."""
    shape, num_owners, cut = list(parameter.shape), dims.world_size, 0
    if parameter.kind == "experts":
        shape[0] //= dims.ep
        num_owners = dims.edp
        cut = expert_shard_dim(shape, num_owners)
    whole = prod(shape)
    is_dense = parameter.kind != "experts" and not parameter.is_wide
    if config.engine.name == "deepspeed" and is_dense:
        return _Weight(parameter, whole, -(-whole // num_owners), num_owners > 1, True)
    sharded = config.engine.zero_stage > 0 and num_owners > 1
    share = whole // shape[cut] * -(-shape[cut] // num_owners) if sharded else whole
    return _Weight(parameter, whole, share, sharded, False)


def _compute_weights(config: Config, weights: list[_Weight]) -> int:
    """Return the elements of weights that a rank holds besides the masters it owns."""
    stage, recompute = config.engine.zero_stage, config.train.recompute
    is_cast = COMPUTE_DTYPES[config.engine.precision].itemsize < 4
    held = 0
    gathered: list[_Weight] = []
    cast_again: list[_Weight] = []
    for weight in weights:
        layer, kind, *_ = weight.parameter
        if weight.sharded and stage == 3 and layer is not None:
            gathered.append(weight)
        elif weight.sharded:
            # Gathered for the forward pass, and kept until it has gone backward.
            held += weight.whole
        elif not is_cast or (kind == "embedding" and not config.model.tie_embeddings):
            # The master itself is used; of the embedding, only rows are cast.
            continue
        elif recompute == "full" and layer is not None:
            cast_again.append(weight)
        else:
            # Autograd keeps the cast weight of each product for the backward pass.
            held += weight.whole
    # The layer that computes, and the next one on its way.
    return held + _largest_layers(gathered, 2) + _largest_layers(cast_again)


def _largest_layers(weights: list[_Weight], num_layers: int = 1) -> int:
    """Return the elements of the largest layers; what is in none counts as one."""
    sizes: dict[int | None, int] = {}
    for weight in weights:
        layer = weight.parameter.layer
        sizes[layer] = sizes.get(layer, 0) + weight.whole
    return sum(sorted(sizes.values())[-num_layers:])
