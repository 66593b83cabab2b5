"""What a training run will take, without running it: parameters, memory a rank, FLOPs.

Arithmetic on a model without weights, so a laptop answers for any size. Called by `dmoe estimate`.
"""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

from rich.table import Column, Table

from dmoe.models.counts import (
    ParameterInfo,
    activations,
    flops_per_token,
    num_active_params,
    parameters,
    params_by_kind,
)
from dmoe.models.precision import COMPUTE_DTYPES
from dmoe.parallel import ParallelDims
from dmoe.parallel.placement import expert_shard_dim
from dmoe.trainer.config import Config

_GIB = 2**30
_NUM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank by what they are for, each at its most; their sum is a bound."""

    parameters: int
    """Master weights: this rank's share."""
    compute_weights: int
    """Weights in the compute dtype, gathered from other ranks or cast from the masters."""
    gradients: int
    """This rank's share, and where they are sharded, those of one layer on their way."""
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


@dataclass(frozen=True)
class Estimate:
    """What a run takes."""

    layout: str
    """The ranks, in words."""
    world_size: int
    num_params: int
    num_active_params: int
    """Parameters that a token uses, on average where its number of experts varies."""
    params_by_kind: dict[str, int]
    memory: Memory
    """Bytes a rank. What libraries, the allocator and single operations need comes on top."""
    flops_per_token: int
    """Forward and backward, with the mean number of experts."""
    tokens_per_step: int
    grad_accum_steps: int
    """Micro-batches of a rank in a step."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values under the names of the fields."""
        tree = asdict(self)
        tree["memory"]["total"] = self.memory.total
        return tree

    def render(self) -> Table:
        """Return a table for a terminal."""
        sizes = asdict(self.memory) | {"total": self.memory.total}
        counts = self.params_by_kind | {
            "total": self.num_params,
            "active": self.num_active_params,
        }
        step = {
            "FLOPs a token": f"{self.flops_per_token:.3e}",
            "FLOPs a step": f"{self.flops_per_token * self.tokens_per_step:.3e}",
            "tokens a step": f"{self.tokens_per_step:,}",
            "micro-batches a rank": f"{self.grad_accum_steps:,}",
        }
        sections = {
            "parameters": {kind: f"{count:,}" for kind, count in counts.items()},
            "GiB a rank": {kind: f"{size / _GIB:,.2f}" for kind, size in sizes.items()},
            "training": step,
        }
        table = Table("", "", Column(justify="right"), show_header=False)
        table.title, table.min_width = self.layout, len(self.layout)
        for title, rows in sections.items():
            for index, (label, value) in enumerate(rows.items()):
                table.add_row("" if index else title, label.replace("_", " "), value)
            table.add_section()
        return table


def estimate(config: Config, world_size: int | None = None) -> Estimate:
    """Estimate a run on `world_size` ranks; on as many as hold the experts once if None.

    Raises:
        ConfigError: the ranks do not divide into ep groups, or the micro-batches over ranks.
    """
    world_size = config.parallel.ep if world_size is None else world_size
    config.check_world(world_size)
    dims = ParallelDims(world_size=world_size, ep=config.parallel.ep)
    model, train = config.model, config.train
    counts = params_by_kind(model)
    return Estimate(
        layout=dims.describe(model.moe.experts if model.moe and model.moe.num_shards else 0),
        world_size=world_size,
        num_params=sum(counts.values()),
        num_active_params=num_active_params(model),
        params_by_kind=counts,
        memory=_memory(config, dims),
        flops_per_token=flops_per_token(model, train.seq_len),
        tokens_per_step=train.global_batch_size * train.seq_len,
        grad_accum_steps=train.num_micro_batches // world_size,
    )


def _memory(config: Config, dims: ParallelDims) -> Memory:
    train = config.train
    dtype = COMPUTE_DTYPES[config.engine.precision]
    compute_size, master_size = dtype.itemsize, max(4, dtype.itemsize)
    weights = [_place(parameter, config, dims) for parameter in parameters(config.model)]
    masters = master_size * sum(weight.share for weight in weights)
    # A layer's gradients are computed in the compute dtype and widened to be summed over ranks.
    on_their_way = _largest_layers([weight for weight in weights if weight.sharded])
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
        compute_weights=compute_size * _compute_weights(config, weights),
        gradients=masters + (compute_size + master_size) * on_their_way,
        optimizer=_NUM_MOMENTS * masters,
        activations=kept.kept + kept.recomputed,
        logits=kept.logits,
    )


class _Weight(NamedTuple):
    """One parameter as the fullest rank sees it, in numbers of elements."""

    parameter: ParameterInfo
    whole: int
    """What the rank computes with: of the experts, its own."""
    share: int
    """What of that the rank owns."""
    sharded: bool
    """Whether it owns less than it computes with, and gathers the rest."""


def _place(parameter: ParameterInfo, config: Config, dims: ParallelDims) -> _Weight:
    """Place a parameter as the native engine does: a dim is cut into equal pieces, rounded up."""
    shape, num_owners, cut = list(parameter.shape), dims.world_size, 0
    if parameter.kind == "experts":
        shape[0] //= dims.ep
        num_owners = dims.edp
        cut = expert_shard_dim(shape, num_owners)
    whole = prod(shape)
    sharded = config.engine.zero_stage > 0 and num_owners > 1
    share = whole // shape[cut] * -(-shape[cut] // num_owners) if sharded else whole
    return _Weight(parameter, whole, share, sharded)


def _compute_weights(config: Config, weights: list[_Weight]) -> int:
    """Return the elements of weights that a rank holds besides the masters it owns."""
    stage, recompute = config.engine.zero_stage, config.train.recompute
    is_cast = COMPUTE_DTYPES[config.engine.precision].itemsize < 4
    held = 0
    gathered: list[_Weight] = []
    cast_again: list[_Weight] = []
    for weight in weights:
        layer, kind, _ = weight.parameter
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
