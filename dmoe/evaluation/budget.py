"""Finds the experts per token of each layer that cost the least loss within a budget.

Three steps, each on the same calibration sample: how much the loss changes when one layer alone
uses another k; dynamic programming over the sum of these changes; a few swaps, each kept only if
the measured loss falls. (Layer budgets by sensitivity: LExI, arXiv 2509.02753; by dynamic
programming: Alloc-MoE, arXiv 2604.08133.) Called by `dmoe eval --budget`. Shape letters: L MoE
layers, K numbers of experts (column j is k = j + 1).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dmoe.data import Dataset, MicroBatch
from dmoe.data.loader import step_batches
from dmoe.evaluation.costs import Costs
from dmoe.evaluation.perplexity import evaluate
from dmoe.models import DecoderLM

Profile = tuple[int, ...]

_STEPS = 10_000
"""Into how many parts a budget is cut where costs are no multiples of a whole number."""


@dataclass(frozen=True)
class FoundProfile:
    """The result of a search; losses are nats a token of the calibration sample."""

    k_L: Profile
    """(L,) experts per token of each MoE layer."""
    loss: float
    cost: float
    """In the unit of the budget."""
    uniform_k: int | None
    """The largest k whose uniform profile is within the budget; None if none is."""
    uniform_loss: float | None
    """With that k in all layers; never below `loss`."""
    num_measured: int
    """Profiles whose loss was measured."""
    num_targets: int
    """Predicted tokens of the calibration sample."""


def calibration_batches(
    dataset: Dataset, num_batches: int, micro_batch_size: int
) -> list[MicroBatch]:
    """Return the first micro-batches of a run's training order, which is shuffled.

    Training text, so that a loss on held-out text stays one on text that no choice has seen.
    """
    return step_batches(
        dataset,
        0,
        global_batch_size=num_batches * micro_batch_size,
        micro_batch_size=micro_batch_size,
        rank=0,
        world=1,
    )


def search_profile(
    model: DecoderLM,
    batches: Sequence[MicroBatch],
    costs: Costs,
    budget: float,
    *,
    num_swaps: int = 8,
) -> FoundProfile:
    """Return the profile with the least loss on `batches` that was found within a budget.

    The change of the loss by one layer's k is measured with the other layers at the largest
    uniform k within the budget (1 if none is): what a layer is worth depends on what the others
    do, and that profile spends about as much as the one that is sought. Its loss is known then, so
    the result is never worse on the sample than the same k in all layers.

    It takes L (K - 1) + 2 passes over the sample, and one for each swap.

    Args:
        model: a decoder with experts.
        batches: the calibration sample; keep it for the search alone.
        costs: what each layer costs at each k.
        budget: the most that a profile may cost.
        num_swaps: measure so many swaps at most; 0 for none.

    Raises:
        ConfigError: the budget is below the cheapest profile or above the most expensive one.
    """
    costs.check(budget)

    def measure(k_L: Profile) -> float:
        with model.at_k(k_L):
            return evaluate(model, batches).loss

    loss_of = Measured(measure)
    num_layers = len(costs.layers_LK)
    uniform = [(k,) * num_layers for k in range(costs.k_max, 0, -1)]
    affordable = [k_L for k_L in uniform if costs.of(k_L) <= budget]
    reference = affordable[0] if affordable else uniform[-1]
    increase_LK = [
        [
            loss_of(_with(reference, layer, k)) - loss_of(reference)
            for k in range(1, costs.k_max + 1)
        ]
        for layer in range(num_layers)
    ]
    candidates = affordable[:1]
    planned = least_sum(increase_LK, costs.layers_LK, budget - costs.base)
    if planned is not None:
        candidates.append(planned)
    best = swap(min(candidates, key=loss_of), loss_of, increase_LK, costs, budget, num_swaps)
    return FoundProfile(
        k_L=best,
        loss=loss_of(best),
        cost=costs.of(best),
        uniform_k=reference[0] if affordable else None,
        uniform_loss=loss_of(reference) if affordable else None,
        num_measured=len(loss_of.known),
        num_targets=sum(batch.num_targets for batch in batches),
    )


class Measured:
    """A function of a profile that is not called twice with the same one."""

    def __init__(self, measure: Callable[[Profile], float]):
        self._measure = measure
        self.known: dict[Profile, float] = {}

    def __call__(self, k_L: Profile) -> float:
        """Return the loss of a profile."""
        if k_L not in self.known:
            self.known[k_L] = self._measure(k_L)
        return self.known[k_L]


def least_sum(
    increase_LK: Sequence[Sequence[float]], cost_LK: Sequence[Sequence[float]], budget: float
) -> Profile | None:
    """Return the profile with the least sum of increases whose cost is within the budget.

    A knapsack with one choice a layer. Whole costs are divided by their greatest common divisor,
    and the result is exact. Others are rounded up to a 10,000th of the budget, so that no result
    exceeds it; a profile within L steps of it may then be passed over. Of equal sums the cheaper
    one is taken.

    Returns:
        (L,) numbers of experts, or None where even the cheapest profile is too expensive.
    """
    if budget <= 0:
        return None
    steps_LK, num_steps = _in_steps(cost_LK, budget)
    if num_steps < sum(map(min, steps_LK)):
        return None
    # sums[b] is the least sum of the layers so far at a cost of exactly b steps.
    sums = np.full(num_steps + 1, math.inf)
    sums[0] = 0.0
    choices: list[np.ndarray] = []
    for increase_K, steps_K in zip(increase_LK, steps_LK, strict=True):
        options = np.full((len(steps_K), num_steps + 1), math.inf)
        for j, (increase, steps) in enumerate(zip(increase_K, steps_K, strict=True)):
            if steps <= num_steps:
                options[j, steps:] = sums[: num_steps + 1 - steps] + increase
        choices.append(options.argmin(axis=0))
        sums = options.min(axis=0)
    at = int(sums.argmin())
    k_L: list[int] = []
    for choice, steps_K in zip(reversed(choices), reversed(steps_LK), strict=True):
        j = int(choice[at])
        k_L.append(j + 1)
        at -= steps_K[j]
    return tuple(reversed(k_L))


def swap(
    start: Profile,
    loss_of: Callable[[Profile], float],
    increase_LK: Sequence[Sequence[float]],
    costs: Costs,
    budget: float,
    num_swaps: int,
) -> Profile:
    """Return the best profile met by moving one expert at a time, from one layer to another.

    The swap that promises most by `increase_LK` is measured first and kept if the loss falls. Ends
    after `num_swaps` measurements, or when no swap is left that was not measured. Where the budget
    allows it, an expert is added without being taken away elsewhere.
    """
    best, seen = start, {start}

    def promised(k_L: Profile) -> float:
        return sum(increase_K[k - 1] for k, increase_K in zip(k_L, increase_LK, strict=True))

    for _ in range(num_swaps):
        left = [
            k_L
            for k_L in _neighbours(best, costs.k_max)
            if k_L not in seen and costs.of(k_L) <= budget
        ]
        if not left:
            break
        candidate = min(left, key=promised)
        seen.add(candidate)
        if loss_of(candidate) < loss_of(best):
            best = candidate
    return best


def _neighbours(k_L: Profile, k_max: int) -> Iterator[Profile]:
    """Yield the profiles with one expert more in a layer, and at most one less in another."""
    for to, k in enumerate(k_L):
        if k == k_max:
            continue
        more = _with(k_L, to, k + 1)
        yield more
        for source, taken in enumerate(k_L):
            if source != to and taken > 1:
                yield _with(more, source, taken - 1)


def _with(k_L: Profile, layer: int, k: int) -> Profile:
    return (*k_L[:layer], k, *k_L[layer + 1 :])


def _in_steps(cost_LK: Sequence[Sequence[float]], budget: float) -> tuple[list[list[int]], int]:
    """Return costs and budget as whole numbers of steps, costs rounded up."""
    costs = [cost for cost_K in cost_LK for cost in cost_K]
    if all(cost == int(cost) for cost in costs):
        divisor = math.gcd(*map(int, costs))
        # The table is as long as the budget in such steps, so there may not be too many.
        if budget / divisor <= 100 * _STEPS:
            steps_LK = [[int(cost) // divisor for cost in cost_K] for cost_K in cost_LK]
            return steps_LK, int(budget // divisor)
    return [[math.ceil(cost / budget * _STEPS) for cost in cost_K] for cost_K in cost_LK], _STEPS
