"""What the runs of a text came to, read from their JSON files.

Called by the report, the claims and the plot. Losses are nats a byte of held-out text.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matryoshka_arms import ARMS, REFERENCE, SPECIALISTS, TRAINED_K, Match

Json = dict[str, Any]


class Text:
    """The results of one text; runs that are not there are left out."""

    def __init__(self, folder: Path):
        self.about: Json = json.loads((folder / "text.json").read_text())
        self.runs: dict[tuple[str, str, int], Json] = {}
        for path in sorted(folder.glob("results/*.json")):
            run = json.loads(path.read_text())
            plan = run["plan"]
            self.runs[plan["arm"], plan["match"], plan["seed"]] = run
        self._share_runs()

    def _share_runs(self) -> None:
        """Let arms that cost what the reference costs stand in both tables with the same run."""
        for (arm, match, seed), run in list(self.runs.items()):
            reference = self.runs.get((REFERENCE, "tokens", seed))
            if match == "tokens" and reference and _same_cost(run, reference):
                self.runs[arm, "flops", seed] = run

    def seeds(self, arm: str, match: Match = "tokens") -> list[int]:
        """Return the seeds that an arm has a result for."""
        return sorted(seed for name, kind, seed in self.runs if (name, kind) == (arm, match))

    @property
    def all_seeds(self) -> list[int]:
        """Return the seeds that any arm has a result for."""
        return sorted({seed for _, _, seed in self.runs})

    def arms(self, match: Match) -> list[str]:
        """Return the arms that have a result, in the order of `ARMS`."""
        return [arm for arm in ARMS if self.seeds(arm, match)]

    def compared_seeds(self, match: Match = "tokens") -> list[int]:
        """Return the seeds of which all specialists and the reference have a result."""
        needed = [REFERENCE, *(arm for arms in SPECIALISTS.values() for arm in arms)]
        return sorted(set.intersection(*(set(self.seeds(arm, match)) for arm in needed)))

    def loss(self, arm: str, k: int, seed: int, match: Match = "tokens") -> float:
        """Return the loss of an arm at k."""
        return self.runs[arm, match, seed]["loss"][str(k)]

    def gap(self, arm: str, k: int, seed: int, match: Match = "tokens") -> float:
        """Return the loss at k above that of the (better) specialist of k, of the same seed."""
        best = min(self.loss(name, k, seed, match) for name in SPECIALISTS[k])
        return self.loss(arm, k, seed, match) - best

    def worst_gap(self, arm: str, seed: int, match: Match = "tokens") -> float:
        """Return the largest gap over the k that have a specialist."""
        return max(self.gap(arm, k, seed, match) for k in TRAINED_K)

    def mean_loss(self, arm: str, seed: int, match: Match = "tokens") -> float:
        """Return the mean loss over the k that have a specialist."""
        return statistics.fmean(self.loss(arm, k, seed, match) for k in TRAINED_K)

    def searches(self) -> Iterator[tuple[int, Json]]:
        """Yield seed and result of each search."""
        for (_, match, seed), run in sorted(self.runs.items()):
            if match == "tokens":
                yield from ((seed, row) for row in run.get("search", ()))


def _same_cost(run: Json, reference: Json) -> bool:
    costs = [r["training_flops"] * r["tokens"] for r in (run, reference)]
    return abs(costs[0] / costs[1] - 1) < 0.001
