"""What the pages of experiments share: claims with their verdicts, numbers with spread, tables.

Called by the reports of the experiments beside this file.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

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


def below(seeds: Iterable[int], words: str, left: Measure, right: Measure) -> Claim:
    """Judge in each seed whether one number is below another."""
    pairs = []
    for seed in seeds:
        try:
            pairs.append((left(seed), right(seed)))
        except KeyError:
            continue  # a run that it needs is not there
    if not pairs:
        return Claim(words, [], "")
    numbers = " against ".join(mean_and_spread(side) for side in zip(*pairs, strict=True))
    return Claim(words, [a < b for a, b in pairs], numbers)


def mean_and_spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation; the mean alone of a single value."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
