"""Writes the page of `classics_language.py` from its runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from classics_language_claims import (
    final_loss,
    inequalities,
    information,
    num_chosen,
    of_balance,
    of_choice,
    violation,
)
from experiment_page import Json, claims_table

TEXT = """\
# Balancing and choosing experts, on language

<!-- Written by tools/experiments/classics_language.py: do not edit. -->

Bytes of {domains}. A micro-batch is of one domain, and a global batch has one of each. The model
has 2 layers of width 64, each with experts; {steps} steps of {tokens:,} bytes. The tables have the
mean and standard deviation over the seeds. The loss is in nats a byte, on text no run has seen, the
mean of the domains. All runs are small: what holds here need not hold for larger models.
"""

BALANCE = """
## Ways to balance

16 experts, of which a token uses 2. The maximal violation is the load of the fullest expert over
the mean, minus 1, in the last fifth of the steps, mean over layers. The mutual information is that
between the domain of a token and its expert, in bits, on held-out text, mean over layers: 0 if
experts do not care for domains.

{balance}

{balance_found}

### Claims

Each is judged in every seed: it holds if the first number is below the second.

{balance_claims}
"""

CHOICE = """
## Ways to choose, at equal active parameters

The experts of a token have 128 gated neurons of 1,024 in each layer, or 144 plain ones of 1,521
with PEER, which has queries beside them. ReMoE starts with half of its experts, and so costs more
at first. Seconds are CPU time of one thread, of the steps alone. The last column is the held-out
loss when an arm had trained as long as the fastest one needed for all its steps, interpolated
between measurements.

{choice}

{choice_found}

{inequalities}

### Claims

A step compares the losses at the end, and the others those after the time of the last column.

{choice_claims}
"""


def write_report(
    rows: Sequence[Json],
    page: Path,
    balance: list[str],
    choice: list[str],
    tokens_of_domain: int,
    *,
    texts: str = "",
) -> None:
    """Write the page.

    Args:
        rows: all runs.
        page: where to write.
        balance: arms of the first table.
        choice: arms of the second.
        tokens_of_domain: bytes of each domain in a step.
        texts: what the domains are, if that is known.
    """
    first = rows[0]
    by_arm = {(row["experiment"], row["arm"]): [] for row in rows}
    for row in rows:
        by_arm[row["experiment"], row["arm"]].append(row)
    text = TEXT.format(
        domains=", ".join(first["domains"]),
        steps=first["steps"],
        tokens=tokens_of_domain * len(first["domains"]),
    )
    text += texts
    balances = {arm: by_arm["balance", arm] for arm in balance if ("balance", arm) in by_arm}
    if balances:
        columns = {
            "loss": (final_loss, 4),
            "maximal violation": (violation, 2),
            "mutual information": (information, 3),
        }
        found = "\n\n".join(_ranking(balances, key) for key in ("loss", "max_violation"))
        text += BALANCE.format(
            balance=_table(columns, balances),
            balance_found=found,
            balance_claims=claims_table(of_balance(_runs(balances))),
        )
    choices = {arm: by_arm["choice", arm] for arm in choice if ("choice", arm) in by_arm}
    if choices:
        limit = min(_mean(runs, _seconds) for runs in choices.values())
        later = partial(loss_after, seconds=limit)
        columns = {
            "loss": (final_loss, 4),
            "experts a token": (num_chosen, 2),
            "active parameters": (lambda row: row["active_params"], 0),
            "all parameters": (lambda row: row["total_params"], 0),
            "seconds": (_seconds, 1),
            f"loss after {limit:.0f} s": (later, 4),
        }
        text += CHOICE.format(
            choice=_table(columns, choices),
            choice_found=_ranking(choices, "loss"),
            inequalities=inequalities(choices),
            choice_claims=claims_table(of_choice(_runs(choices), later, limit)),
        )
    missing = [
        arm
        for experiment, arms in (("balance", balance), ("choice", choice))
        for arm in arms
        if (experiment, arm) not in by_arm
    ]
    if missing:
        text += f"\nNot measured: {', '.join(missing)}.\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)


def loss_after(row: Json, seconds: float) -> float:
    """Return the loss at a time, on the line between the measurements around it."""
    curve = row["curve"]
    for before, after in pairwise(curve):
        if seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["loss"] + max(0.0, share) * (after["loss"] - before["loss"])
    return curve[-1]["loss"]


def _seconds(row: Json) -> float:
    return row["curve"][-1]["seconds"]


def _runs(arms: dict[str, list[Json]]) -> list[Json]:
    return [run for runs in arms.values() for run in runs]


def _mean(runs: Sequence[Json], value: Callable[[Json], float]) -> float:
    return statistics.fmean(value(run) for run in runs)


def _table(
    columns: Mapping[str, tuple[Callable[[Json], float], int]], arms: dict[str, list[Json]]
) -> str:
    lines = ["| arm | seeds | " + " | ".join(columns) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(columns))
    for arm, runs in arms.items():
        cells = []
        for value, digits in columns.values():
            values = [value(run) for run in runs]
            text = f"{statistics.fmean(values):,.{digits}f}"
            if digits and len(values) > 1:
                text += f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(text)
        lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ranking(arms: dict[str, list[Json]], key: str) -> str:
    """Say the order of the arms, and whether the first is apart from the second."""
    value = final_loss if key == "loss" else lambda row: row[key]
    order = sorted(arms, key=lambda arm: _mean(arms[arm], value))
    best, second = (sorted(value(run) for run in arms[arm]) for arm in order[:2])
    apart = "the seeds of the first two overlap, so their order says nothing"
    if best[-1] < second[0]:
        apart = "every seed of the first is below every seed of the second"
    name = "loss" if key == "loss" else "maximal violation"
    return f"By {name}, lowest first: {', '.join(order)}; {apart}."
