"""Writes docs/results/classics.md from the runs of `classics.py`; every number is computed here."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import classics_claims
from classics_arms import ARMS, PLAIN
from classics_claims import cv_importance, cv_load, dropped, early_loss, loss, max_load, perplexity
from classics_mixtures import CRITERION, EPOCHS, OBJECTIVES, SYSTEMS
from experiment_page import Claim, claims_table

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


_TEXTS = """\
The text, as it was when this page was written:"""

_CLAIMS = """\
Claims of the papers are judged in each seed, at these sizes; a comparison holds if the first number
is below the second, and numbers in a row have to fall."""


class Table(NamedTuple):
    """A table of some arms of a group."""

    group: str
    arms: Sequence[str]
    text: str
    columns: Columns
    claims: Callable[[Iterable[Json]], list[Claim]]
    """Judges the group."""


_TOP_1 = list(ARMS["top-1"])
_TABLES = (
    Table(
        "importance and load",
        list(ARMS["importance and load"]),
        """\
## Losses on importance and load (2017)

Noisy top-2 with the weights w_importance, w_load of table 6 of arXiv 1701.06538. CV is the standard
deviation over the mean of an expert's amount in a micro-batch; that of the load is of the smooth
estimate, and max / mean of the tokens themselves.""",
        {
            "perplexity a byte": perplexity,
            "CV(importance)": cv_importance,
            "CV(load)": cv_load,
            "max / mean load": max_load,
        },
        classics_claims.of_importance_and_load,
    ),
    Table(
        "top-1",
        [arm for arm in _TOP_1 if arm.startswith("capacity")] + [PLAIN],
        """\
## Capacity (GShard, Switch)

Top-1 with the load-balancing loss; the capacity factor is the same in training and evaluation, and
the plain arm drops nothing.""",
        {"loss": loss, "dropped tokens": dropped, "max / mean load": max_load},
        classics_claims.of_capacity,
    ),
    Table(
        "top-1",
        [PLAIN, "router in bfloat16"],
        """\
## Precision of the router (Switch)

All else is float32. Switch reports that a model wholly in bfloat16 diverges and one with a float32
router does not; here the router alone is rounded.
Selective precision itself, a model in bfloat16 around a float32 router, is not among the arms.""",
        {"loss": loss, "max / mean load": max_load},
        classics_claims.of_precision,
    ),
    Table(
        "top-1",
        [PLAIN, "initial scale 1", "initial scale 0.1"],
        """\
## Scale of the initial weights (Switch)

The plain arm has a standard deviation of 0.02. The early loss is held out as well, an eighth of the
way. Switch reports that the smaller scale is better early and varies less from run to run.""",
        {"loss": loss, "early loss": early_loss},
        classics_claims.of_scale,
    ),
)


def write_report(
    mixtures: Sequence[Json], language: Sequence[Json], page: Path = PAGE, *, texts: str = ""
) -> str:
    """Write the page from the rows of both files, and return what was written.

    Args:
        mixtures: runs of 1991.
        language: runs on language.
        page: where to write.
        texts: table of what the language runs read.
    """
    parts = [_INTRO]
    if mixtures:
        parts += [_MIXTURES, _mixtures(mixtures), *_verdict(mixtures)]
    if language:
        first = language[0]
        parts.append(_LANGUAGE.format(tokens=first["tokens"], steps=first["steps"]))
        parts += [_TEXTS, texts] if texts else []
        parts.append(_CLAIMS)
    for group, arms, text, columns, claims in _TABLES:
        rows = [row for row in language if row["group"] == group]
        by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
        if any(by_arm.values()):
            parts += [
                text,
                _table(group, by_arm, columns),
                "### Claims",
                claims_table(claims(rows)),
            ]
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
