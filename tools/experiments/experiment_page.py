"""What the pages of experiments share: claims with their verdicts, numbers with spread, tables.

Called by the reports of the experiments beside this file.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Json = dict[str, Any]
Value = Callable[[Json], float]
"""A number of a run; KeyError where the run has not measured it."""
Measure = Callable[[int], float]
"""A number of a seed; KeyError where a run that it needs is not there."""


class Claim(NamedTuple):
    """Something that should show, and whether it did."""

    words: str
    held: list[bool]
    """In each case."""
    numbers: str

    @property
    def verdict(self) -> str:
        """Return what became of it, in words."""
        if not self.held:
            return "not measured"
        if all(self.held):
            return f"holds in all {len(self.held)}"
        if not any(self.held):
            return f"does not hold in any of {len(self.held)}"
        return f"holds in {sum(self.held)} of {len(self.held)}"


class OfAllSeeds(Claim):
    """A claim that the seeds are judged by together, such as one about their spread."""

    @property
    def verdict(self) -> str:
        """Return what became of it, in words."""
        if not self.held:
            return "not measured"
        return "holds" if all(self.held) else "does not hold"


class Runs:
    """Runs of some arms, found by arm and seed."""

    def __init__(self, rows: Iterable[Json]):
        self.by_run = {(row["arm"], row["seed"]): row for row in rows}
        self.seeds = sorted({seed for _, seed in self.by_run})

    def of(self, arm: str, value: Value) -> Measure:
        """Return the number of an arm."""
        return lambda seed: value(self.by_run[arm, seed])

    def most(self, arms: Sequence[str], value: Value) -> Measure:
        """Return the largest number of some arms."""
        return lambda seed: max(value(self.by_run[arm, seed]) for arm in arms)

    def least(self, arms: Sequence[str], value: Value) -> Measure:
        """Return the smallest number of some arms."""
        return lambda seed: min(value(self.by_run[arm, seed]) for arm in arms)


def below(seeds: Iterable[int], words: str, left: Measure, right: Measure) -> Claim:
    """Judge in each seed whether one number is below another."""
    pairs = _measured(seeds, left, right)
    if not pairs:
        return Claim(words, [], "")
    return Claim(words, [a < b for a, b in pairs], _against(pairs))


def falls(seeds: Iterable[int], words: str, measures: Sequence[Measure]) -> Claim:
    """Judge in each seed whether every number is below the one before it."""
    rows = _measured(seeds, *measures)
    if not rows:
        return Claim(words, [], "")
    numbers = ", ".join(mean_and_spread(column) for column in zip(*rows, strict=True))
    return Claim(words, [all(b < a for a, b in pairwise(row)) for row in rows], numbers)


def varies_less(seeds: Iterable[int], words: str, left: Measure, right: Measure) -> Claim:
    """Judge whether one number has a smaller standard deviation over the seeds than another."""
    pairs = _measured(seeds, left, right)
    if len(pairs) < 2:
        return OfAllSeeds(words, [], "")
    ours, theirs = (statistics.stdev(side) for side in zip(*pairs, strict=True))
    return OfAllSeeds(words, [ours < theirs], f"{ours:.4f} against {theirs:.4f}")


def differ_less_than_seeds(
    seeds: Iterable[int], words: str, left: Measure, right: Measure
) -> Claim:
    """Judge in each seed whether two numbers are closer than the deviation of the second."""
    pairs = _measured(seeds, left, right)
    if len(pairs) < 2:
        return Claim(words, [], "")
    spread = statistics.stdev(b for _, b in pairs)
    differences = [a - b for a, b in pairs]
    numbers = f"{mean_and_spread(differences)} against {spread:.4f}"
    return Claim(words, [abs(difference) < spread for difference in differences], numbers)


def _measured(seeds: Iterable[int], *measures: Measure) -> list[tuple[float, ...]]:
    """Return the numbers of those seeds that have all of them."""
    rows = []
    for seed in seeds:
        try:
            rows.append(tuple(measure(seed) for measure in measures))
        except KeyError:
            continue  # a run that it needs is not there
    return rows


def _against(pairs: Sequence[tuple[float, ...]]) -> str:
    return " against ".join(mean_and_spread(side) for side in zip(*pairs, strict=True))


def claims_table(claims: Iterable[Claim]) -> str:
    """Return the claims and what became of them as a table in Markdown."""
    return table(
        ["claim", "verdict", "what was compared"],
        [[claim.words, claim.verdict, claim.numbers] for claim in claims],
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation; the mean alone of a single value."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
