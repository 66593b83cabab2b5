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
        self.num_experts = config.moe.num_counted if config.moe else 0
        self.loss: Tensor | float = 0.0
        self.aux: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.expert_names: list[str] = []
        self.stats: list[Tensor] = []

    def add(self, loss: Tensor, outputs: list[MoEOutput]) -> None:
        """Add one micro-batch."""
        self.loss = self.loss + loss.detach().double()
        for output in outputs:
            for name, value in output.losses.items():
                self.aux[name] = self.aux.get(name, 0.0) + value.detach().double()
        # One row a layer: slots and the router's own sums by expert, dropped slots, and other sums.
        rows = []
        for stats in (output.stats for output in outputs):
            self.names = sorted(name for name, value in stats.sums.items() if not value.ndim)
            self.expert_names = sorted(stats.sums.keys() - self.names)
            sums = [stats.dropped, *(stats.sums[name] for name in self.names)]
            by_expert = [stats.counts_E, *(stats.sums[name] for name in self.expert_names)]
            rows.append(torch.cat([value.double().view(-1) for value in (*by_expert, *sums)]))
        if rows:
            self.stats.append(torch.stack(rows))

    def result(self, group: dist.ProcessGroup | None, totals: BatchTotals) -> StepResult:
        """Sum over the ranks; counts are exact in float64."""
        names = sorted(self.aux)
        num_experts, by_expert = self.num_experts, self.num_experts * (1 + len(self.expert_names))
        width = by_expert + 1 + len(self.names)
        stats = torch.zeros(self.num_layers, width, dtype=torch.float64)
        if self.stats:
            stats = torch.stack(self.stats).sum(0)
        head = torch.stack([torch.as_tensor(self.loss), *(self.aux[name] for name in names)])
        packed = all_reduce_sum(torch.cat([head.to(stats.device), stats.flatten()]), group).cpu()
        loss, *aux = packed[: len(head)].tolist()
        stats = packed[len(head) :].view_as(stats)
        counts_LE, *sums_LE = stats[:, :by_expert].split(num_experts or 1, dim=1)
        means_NL = stats[:, by_expert + 1 :].t() / totals.num_tokens
        return StepResult(
            loss=loss,
            aux_losses={n: v / self.num_layers for n, v in zip(names, aux, strict=True)},
            counts_LE=counts_LE.long(),
            dropped_L=stats[:, by_expert].long(),
            means=dict(zip(self.names, means_NL, strict=True)),
            expert_means={
                name: sum_LE / totals.num_tokens
                for name, sum_LE in zip(self.expert_names, sums_LE, strict=True)
            },
            num_tokens=totals.num_tokens,
        )
