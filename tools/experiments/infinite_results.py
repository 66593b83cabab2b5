"""What the runs of a text came to, read from their JSON files.

Called by the report, the claims and the plot. Losses are nats a byte of held-out text.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from infinite_arms import ARMS, Group

Json = dict[str, Any]


class Text:
    """The results of one text; runs that are not there are left out."""

    def __init__(self, folder: Path):
        self.about: Json = json.loads((folder / "text.json").read_text())
        self.runs: dict[tuple[str, int], Json] = {}
        for path in sorted(folder.glob("results/*.json")):
            run = json.loads(path.read_text())
            self.runs[run["plan"]["arm"], run["plan"]["seed"]] = run

    def seeds(self, arm: str) -> list[int]:
        """Return the seeds that an arm has a result for."""
        return sorted(seed for name, seed in self.runs if name == arm)

    @property
    def all_seeds(self) -> list[int]:
        """Return the seeds that any arm has a result for."""
        return sorted({seed for _, seed in self.runs})

    def arms(self, group: Group) -> list[str]:
        """Return the arms of a question that have a result, in the order of `ARMS`."""
        return [name for name, arm in ARMS.items() if arm.group == group and self.seeds(name)]

    def loss(self, arm: str, seed: int) -> float:
        """Return the loss of an arm as it was trained, on all held-out text."""
        return self.runs[arm, seed]["loss"]

    def at(self, arm: str, number: int | str, seed: int) -> float:
        """Return the loss at a number of samples or experts, on the first held-out tokens."""
        return self.runs[arm, seed]["at"][str(number)]["loss"]

    def numbers(self, arm: str) -> list[str]:
        """Return the numbers of samples or experts that an arm was measured at."""
        return list(self.runs[arm, self.seeds(arm)[0]]["at"])

    def usage(self, arm: str, number: int | str, name: str, seed: int) -> float:
        """Return a statistic of the layers at a number of samples or experts, their mean."""
        use = self.runs[arm, seed]["at"][str(number)]
        values = use[f"{name}_L"] if f"{name}_L" in use else use["means_L"][name]
        return statistics.fmean(values)

    def curve(self, arm: str, name: str, seed: int) -> dict[int, list[float]]:
        """Return a statistic of each layer at each step of training that was logged."""
        return {
            point["step"]: point[f"{name}_L"]
            for point in self.runs[arm, seed]["curves"]
            if f"{name}_L" in point
        }
