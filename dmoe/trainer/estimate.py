"""What a training run will take, without running it: parameters, memory a rank, FLOPs.

Arithmetic on a model without weights, so a laptop answers for any size. Called by `dmoe estimate`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Column, Table

from dmoe.models.counts import flops_per_token, num_active_params, params_by_kind
from dmoe.parallel import ParallelDims
from dmoe.trainer.config import Config
from dmoe.trainer.memory import Memory, memory_of_a_rank

_GIB = 2**30


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
        layout=dims.describe(model.moe.num_leaves if model.moe and model.moe.num_shards else 0),
        world_size=world_size,
        num_params=sum(counts.values()),
        num_active_params=num_active_params(model),
        params_by_kind=counts,
        memory=memory_of_a_rank(config, dims),
        flops_per_token=flops_per_token(model, train.seq_len),
        tokens_per_step=train.global_batch_size * train.seq_len,
        grad_accum_steps=train.num_micro_batches // world_size,
    )
