"""What each number of experts costs in each MoE layer: experts, FLOPs, or measured seconds.

Costs add up over the layers, on top of what the rest of the model costs. Shape letters: L MoE
layers, K numbers of experts (column j is k = j + 1), T tokens, D model dim.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.data import MicroBatch
from dmoe.evaluation.perplexity import inputs_of
from dmoe.models import DecoderLM, ModelConfig
from dmoe.models.counts import flops_per_token, inactive, multiplied
from dmoe.models.k_profile import BudgetUnit
from dmoe.moe import MoEContext
from dmoe.moe.routing import Replay


@dataclass(frozen=True)
class Costs:
    """The cost of any profile: `base + sum_l layers_LK[l][k_l - 1]`."""

    unit: BudgetUnit
    base: float
    """Of all but the routed experts."""
    layers_LK: tuple[tuple[float, ...], ...]
    """Of each MoE layer at k = 1, 2, ..., the most that is allowed."""

    @property
    def k_max(self) -> int:
        """The most experts per token of a layer."""
        return len(self.layers_LK[0])

    def of(self, k_L: Sequence[int]) -> float:
        """Return the cost of a profile."""
        return self.base + sum(
            costs_K[k - 1] for k, costs_K in zip(k_L, self.layers_LK, strict=True)
        )

    def check(self, budget: float) -> None:
        """Check that a budget leaves a choice.

        Raises:
            ConfigError: no profile is as cheap, or every profile is cheaper.
        """
        num_layers = len(self.layers_LK)
        least = self.base + sum(map(min, self.layers_LK))
        most = self.base + sum(map(max, self.layers_LK))
        if self.unit == "experts" and budget != budget // 1:
            raise ConfigError(f"a budget of {budget:.10g} experts is not a whole number")
        if not budget >= least:  # nor a NaN
            reason = f"{least:.10g}, what the cheapest profile costs"
            if self.unit == "experts":
                reason = "the number of MoE layers, of which each needs one"
            raise ConfigError(
                f"a budget of {budget:.10g} {NOUNS[self.unit]} is below {reason}: give "
                f"{least:.10g} to {most:.10g}"
            )
        if budget > most:
            raise ConfigError(
                f"a budget of {budget:.10g} {NOUNS[self.unit]} is above {most:.10g}, the most that "
                f"{num_layers} MoE layers of at most {self.k_max} experts a token cost: lower it, "
                f"or raise the most experts with --k-max"
            )


NOUNS = {"experts": "experts", "flops": "forward FLOPs a token", "latency": "seconds a pass"}
"""What the units count."""


def expert_costs(config: ModelConfig, k_max: int) -> Costs:
    """Count active experts: the sum of k over the layers."""
    costs_K = tuple(map(float, range(1, k_max + 1)))
    return Costs("experts", 0.0, (costs_K,) * len(config.moe_layers))


def flop_costs(config: ModelConfig, k_max: int, *, seq_len: int) -> Costs:
    """Count the forward FLOPs of a token, as `flops_per_token` does, in a sequence of `seq_len`."""
    numbers = multiplied(config)
    by_layer = [Counter({n: m for n, m in numbers[i].items() if n}) for i in config.moe_layers]
    return Costs(
        "flops",
        float(flops_per_token(config, seq_len, training=False, k=0)),
        tuple(
            tuple(
                2.0 * (by_level.total() - inactive(config.moe, by_level, k, seq_len))
                for k in range(1, k_max + 1)
            )
            for by_level in by_layer
        ),
    )


@torch.no_grad()
def latency_costs(
    model: DecoderLM, batch: MicroBatch, k_max: int, *, num_repeats: int = 5
) -> Costs:
    """Measure the seconds of each MoE layer at each k, and those of a whole forward pass.

    Each layer is timed alone, on what it reads of `batch` with every layer at `k_max`: medians of
    `num_repeats` rounds over all layers and k, after one that warms up. `base` is what a whole pass
    at `k_max` takes beyond its MoE layers. So the cost of a profile is an estimate: it supposes
    that layers add up and that times repeat, which on a busy machine they do only roughly.
    """
    batch = batch.to(model.embed.weight.device)
    calls: list[tuple[Tensor, MoEContext]] = []

    def keep(_module: object, arguments: tuple[Any, ...]) -> None:
        calls.append((arguments[0], arguments[1]))

    def whole() -> object:
        return model(inputs_of(batch))

    with model.at_k(k_max):
        with ExitStack() as stack:
            for layer in model.moe_layers:
                stack.callback(layer.register_forward_pre_hook(keep).remove)
            whole()
        seconds: dict[tuple[int, int], list[float]] = {}
        wholes: list[float] = []
        for _ in range(num_repeats + 1):
            for index, (layer, (x_TD, context)) in enumerate(
                zip(model.moe_layers, calls, strict=True)
            ):
                for k in range(1, k_max + 1):
                    # A new replay, as the old one would give the routing of the first call.
                    here = replace(context, k_L=(k,) * len(calls), replay=Replay())
                    taken = _seconds(lambda: layer(x_TD, here), x_TD.device)  # noqa: B023
                    seconds.setdefault((index, k), []).append(taken)
            wholes.append(_seconds(whole, model.embed.weight.device))
    layers_LK = tuple(
        tuple(median(seconds[index, k][1:]) for k in range(1, k_max + 1))
        for index in range(len(calls))
    )
    base = median(wholes[1:]) - sum(costs_K[-1] for costs_K in layers_LK)
    return Costs("latency", max(0.0, base), layers_LK)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the time of a call, with all that it starts on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
