"""Sums what the micro-batches of a step report, and reduces it over the ranks in one message."""

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.engine.base import StepResult
from dmoe.models import ModelConfig
from dmoe.moe import BatchTotals, MoEOutput
from dmoe.parallel import all_reduce_sum


class Tally:
    """Loss, auxiliary losses and router statistics of one step."""

    def __init__(self, config: ModelConfig):
        self.num_layers = len(config.moe_layers)
        self.num_experts = config.moe.num_experts if config.moe else 0
        self.loss: Tensor | float = 0.0
        self.aux: dict[str, Tensor] = {}
        self.stats: list[Tensor] = []

    def add(self, loss: Tensor, outputs: list[MoEOutput]) -> None:
        """Add one micro-batch."""
        self.loss = self.loss + loss.detach().double()
        for output in outputs:
            for name, value in output.losses.items():
                self.aux[name] = self.aux.get(name, 0.0) + value.detach().double()
        # One row a layer: slots of each expert, dropped slots, summed entropy.
        rows = [
            torch.cat([s.counts_E.double(), torch.stack([s.dropped.double(), s.entropy.double()])])
            for s in (output.stats for output in outputs)
        ]
        if rows:
            self.stats.append(torch.stack(rows))

    def result(self, group: dist.ProcessGroup | None, totals: BatchTotals) -> StepResult:
        """Sum over the ranks; counts are exact in float64."""
        names = sorted(self.aux)
        stats = torch.zeros(self.num_layers, self.num_experts + 2, dtype=torch.float64)
        if self.stats:
            stats = torch.stack(self.stats).sum(0)
        head = torch.stack([torch.as_tensor(self.loss), *(self.aux[name] for name in names)])
        packed = all_reduce_sum(torch.cat([head.to(stats.device), stats.flatten()]), group).cpu()
        loss, *aux = packed[: len(head)].tolist()
        stats = packed[len(head) :].view_as(stats)
        return StepResult(
            loss=loss,
            aux_losses={n: v / self.num_layers for n, v in zip(names, aux, strict=True)},
            counts_LE=stats[:, : self.num_experts].long(),
            dropped_L=stats[:, self.num_experts].long(),
            entropy_L=stats[:, self.num_experts + 1] / totals.num_tokens,
            num_tokens=totals.num_tokens,
        )
