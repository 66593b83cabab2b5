"""Writes docs/results/classics.md from the runs of `classics.py`; every number is computed here."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from classics_arms import ARMS, PLAIN
from classics_mixtures import CRITERION, EPOCHS, OBJECTIVES, SYSTEMS

PAGE = Path(__file__).parents[2] / "docs" / "results" / "classics.md"

_EPOCHS = "epochs until learned"

Json = dict[str, Any]
Columns = dict[str, Callable[[Json], float | None]]

_INTRO = """\
# Classical mixtures of experts, 1991 to 2021, on small tasks

Written by `python tools/experiments/classics.py report`; do not edit by hand.

Tables have mean ± standard deviation over the seeds, whose number is the first column. All runs are
small: what shows here need not show in larger models, and what does not show here may."""

_MIXTURES = f"""\
## Adaptive mixtures of local experts (1991)

Cases come in four clusters in the plane, each with a linear map of its own; four linear experts
under a linear gate are to find that out, with each of the three losses, and a network of one hidden
layer with as many parameters is beside them. The error is that on new cases, as a share of their
variance. The task counts as learned at {CRITERION:g}, within {EPOCHS} epochs of one step of Adam;
the epochs are the mean of those runs that learned it. Every system has the learning rate, of 0.03,
0.1 and 0.3, with which it learns soonest on three other seeds, and the likelihood so the unit of
its targets as well, 1, 3 or 10, as its Gaussians have a deviation of 1. The information is that
between a case's cluster and its expert of the largest gate, 2 bits at best; an expert is used if it
is that for 5% of the cases. The last column lets this expert answer alone."""

_LANGUAGE = """\
Language runs train on {tokens:,} bytes of the source files of Python's standard library, {steps}
steps of a model of `tools/experiments/classics.yaml`: 2 layers of 16 experts. The loss is nats a
byte on held-out text; other columns are means over the last fifth of the training steps and over
the layers. Differences in loss of the size of the spread over seeds mean nothing."""


class Table(NamedTuple):
    """A table of some arms of a group."""

    group: str
    arms: Sequence[str]
    text: str
    columns: Columns


_TOP_1 = list(ARMS["top-1"])
_TABLES = (
    Table(
        "importance and load",
        list(ARMS["importance and load"]),
        """\
## Losses on importance and load (2017)

Noisy top-2 with the weights w_importance, w_load, after table 6 of arXiv 1701.06538. CV is the
standard deviation over the mean of an expert's amount in a micro-batch; that of the load is of the
smooth estimate, and max / mean of the tokens themselves.""",
        {
            "perplexity a byte": lambda row: math.exp(row["loss"]),
            "CV(importance)": lambda row: math.sqrt(row["moe/importance_loss"]),
            "CV(load)": lambda row: math.sqrt(row["moe/load_loss"]),
            "max / mean load": lambda row: row["moe/load_max_over_mean_mean"],
        },
    ),
    Table(
        "top-1",
        [arm for arm in _TOP_1 if arm.startswith("capacity")] + [PLAIN],
        """\
## Capacity (GShard, Switch)

Top-1 with the load-balancing loss; the capacity factor is the same in training and evaluation, and
the plain arm drops nothing.""",
        {
            "loss": lambda row: row["loss"],
            "dropped tokens": lambda row: row["moe/drop_frac_mean"],
            "max / mean load": lambda row: row["moe/load_max_over_mean_mean"],
        },
    ),
    Table(
        "top-1",
        [PLAIN, "router in bfloat16"],
        """\
## Precision of the router (Switch)

All else is float32. Switch reports that a model wholly in bfloat16 diverges and one with a float32
router does not; here the router alone is rounded.""",
        {
            "loss": lambda row: row["loss"],
            "max / mean load": lambda row: row["moe/load_max_over_mean_mean"],
        },
    ),
    Table(
        "top-1",
        [PLAIN, "initial scale 1", "initial scale 0.1"],
        """\
## Scale of the initial weights (Switch)

The plain arm has a standard deviation of 0.02. The early loss is held out as well, an eighth of the
way. Switch reports that the smaller scale is better early and varies less from run to run.""",
        {"loss": lambda row: row["loss"], "early loss": lambda row: row["early_loss"]},
    ),
)


def write_report(mixtures: Sequence[Json], language: Sequence[Json], page: Path = PAGE) -> str:
    """Write the page from the rows of both files, and return what was written."""
    parts = [_INTRO]
    if mixtures:
        parts += [_MIXTURES, _mixtures(mixtures), *_verdict(mixtures)]
    if language:
        first = language[0]
        parts.append(_LANGUAGE.format(tokens=first["tokens"], steps=first["steps"]))
    for group, arms, text, columns in _TABLES:
        rows = [row for row in language if row["group"] == group]
        by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
        if any(by_arm.values()):
            parts += [text, _table(group, by_arm, columns)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n")
    return f"{page}: {len(mixtures)} mixtures, {len(language)} language runs"


def _mixtures(rows: Sequence[Json]) -> str:
    by_system = {system: [row for row in rows if row["system"] == system] for system in SYSTEMS}
    learned = {
        system: f"{sum(row['epochs'] is not None for row in runs)} of {len(runs)}"
        for system, runs in by_system.items()
    }
    settings = {
        system: f"{runs[0]['lr']:g}" + (f", {runs[0]['unit']:g}" if system == "likelihood" else "")
        for system, runs in by_system.items()
        if runs
    }
    columns: Columns = {
        "error": lambda row: row["error"],
        _EPOCHS: lambda row: row["epochs"],
        "information, bits": lambda row: row.get("information"),
        "experts used": lambda row: row.get("num_used"),
        "largest gate": lambda row: row.get("gate"),
        "error, one expert alone": lambda row: row.get("alone"),
    }
    return _table("loss", by_system, columns, {"rate, unit": settings, "learned": learned})


def _verdict(rows: Sequence[Json]) -> list[str]:
    """Say in how many seeds the likelihood specialises more and learns sooner than each other."""
    by_run = {(row["system"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    if len(by_run) < len(SYSTEMS) * len(seeds):
        return []
    lines = []
    for other in SYSTEMS:
        pairs = [(by_run["likelihood", seed], by_run[other, seed]) for seed in seeds]
        sooner = sum(_epochs(ours) < _epochs(theirs) for ours, theirs in pairs)
        words = f"is learned sooner in {sooner}"
        if other in OBJECTIVES:
            more = sum(ours["information"] > theirs["information"] for ours, theirs in pairs)
            words += f" and has more information in {more}"
        if other != "likelihood":
            lines.append(f"{_NAMES[other]} it {words}")
    return [
        f"The paper has the likelihood learn soonest and specialise most. Here, of {len(seeds)} "
        f"seeds: {'; '.join(lines)}. A task that was never learned counts as later."
    ]


_NAMES = {
    "cooperative": "against the cooperative loss",
    "competitive": "against the competitive loss",
    "one network": "against the network",
}


def _epochs(row: Json) -> float:
    return math.inf if row["epochs"] is None else row["epochs"]


def _table(
    title: str,
    by_arm: dict[str, list[Json]],
    columns: Columns,
    words: dict[str, dict[str, str]] | None = None,
) -> str:
    """Return a table of the arms that have runs; a cell is empty where no run has the number."""
    words = words or {}
    lines = [[title, "seeds", *words, *columns]]
    lines.append(["---"] * len(lines[0]))
    for arm, runs in by_arm.items():
        if not runs:
            continue
        cells = [arm, f"{len(runs)}", *(texts[arm] for texts in words.values())]
        for name, value in columns.items():
            found = [number for number in map(value, runs) if number is not None]
            cells.append(_mean_and_spread(found, 0 if name == _EPOCHS else 3))
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
