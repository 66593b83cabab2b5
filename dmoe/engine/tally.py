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
        self.vectors: dict[str, int] = {}
        self.stats: list[Tensor] = []

    def add(self, loss: Tensor, outputs: list[MoEOutput]) -> None:
        """Add one micro-batch."""
        self.loss = self.loss + loss.detach().double()
        for output in outputs:
            for name, value in output.losses.items():
                self.aux[name] = self.aux.get(name, 0.0) + value.detach().double()
        # One row a layer: slots by expert, the router's own vectors, dropped slots, other sums.
        rows = []
        for stats in (output.stats for output in outputs):
            self.names = sorted(name for name, value in stats.sums.items() if not value.ndim)
            self.vectors = {n: len(stats.sums[n]) for n in sorted(stats.sums.keys() - self.names)}
            vectors = [stats.counts_E, *(stats.sums[name] for name in self.vectors)]
            sums = [stats.dropped, *(stats.sums[name] for name in self.names)]
            rows.append(torch.cat([value.double().view(-1) for value in (*vectors, *sums)]))
        if rows:
            self.stats.append(torch.stack(rows))

    def result(self, group: dist.ProcessGroup | None, totals: BatchTotals) -> StepResult:
        """Sum over the ranks; counts are exact in float64."""
        names = sorted(self.aux)
        widths = [self.num_experts, *self.vectors.values(), 1, *[1] * len(self.names)]
        stats = torch.zeros(self.num_layers, sum(widths), dtype=torch.float64)
        if self.stats:
            stats = torch.stack(self.stats).sum(0)
        head = torch.stack([torch.as_tensor(self.loss), *(self.aux[name] for name in names)])
        packed = all_reduce_sum(torch.cat([head.to(stats.device), stats.flatten()]), group).cpu()
        loss, *aux = packed[: len(head)].tolist()
        stats = packed[len(head) :].view_as(stats)
        counts_LE, *sums = stats.split(widths, dim=1)
        means = [sum_L / totals.num_tokens for sum_L in sums]
        vectors, dropped_L1 = means[: len(self.vectors)], sums[len(self.vectors)]
        return StepResult(
            loss=loss,
            aux_losses={n: v / self.num_layers for n, v in zip(names, aux, strict=True)},
            counts_LE=counts_LE.long(),
            dropped_L=dropped_L1[:, 0].long(),
            means={
                name: mean_L1[:, 0]
                for name, mean_L1 in zip(self.names, means[len(vectors) + 1 :], strict=True)
            },
            vector_means=dict(zip(self.vectors, vectors, strict=True)),
            num_tokens=totals.num_tokens,
        )
