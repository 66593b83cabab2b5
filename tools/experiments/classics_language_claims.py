"""Which claims of the papers show in the runs of `classics_language.py`.

Called by `classics_language_report.py`. A claim is a comparison of two numbers in each seed.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from experiment_page import Claim, Json, Measure, Runs, Value, below

NEAR = 0.05
"""By what share the experts of a token may miss their target."""


def final_loss(row: Json) -> float:
    """Return the held-out loss after the last step."""
    return row["curve"][-1]["loss"]


def violation(row: Json) -> float:
    """Return the maximal violation of the load."""
    return row["max_violation"]


def information(row: Json) -> float:
    """Return the mutual information of domain and expert in bits."""
    return row["mutual_information"]


def num_chosen(row: Json) -> float:
    """Return the mean number of experts of a token."""
    return row["mean_k"]


def of_balance(rows: Iterable[Json]) -> list[Claim]:
    """Judge what the papers on balancing say, by violation, loss and mutual information."""
    runs = Runs(rows)
    none, micro, whole, bias = "none", "micro-batch loss", "global-batch loss", "loss-free bias"
    ways = (micro, whole, bias)
    return [
        below(
            runs.seeds,
            "Each way lowers the violation: the highest of the three against none",
            runs.most(ways, violation),
            runs.of(none, violation),
        ),
        *(
            below(
                runs.seeds,
                f"The {bias} has less violation than the {other}",
                runs.of(bias, violation),
                runs.of(other, violation),
            )
            for other in (micro, whole)
        ),
        *(
            below(
                runs.seeds,
                f"The {bias} has a lower loss than {'the ' if other in ways else ''}{other}",
                runs.of(bias, final_loss),
                runs.of(other, final_loss),
            )
            for other in (micro, whole, none)
        ),
        below(
            runs.seeds,
            f"The {whole} has a lower loss than the {micro}",
            runs.of(whole, final_loss),
            runs.of(micro, final_loss),
        ),
        *(
            below(
                runs.seeds,
                f"Experts know domains better with the {whole} than with the {other}: less mutual "
                "information with the latter",
                runs.of(other, information),
                runs.of(whole, information),
            )
            for other in (micro, bias)
        ),
    ]


def of_choice(rows: Iterable[Json], later: Value, seconds: float) -> list[Claim]:
    """Judge what the papers on choosing say; `later` is the loss of a run after `seconds`."""
    runs = Runs(rows)

    def better(words: str, arm: str, other: str) -> list[Claim]:
        return [
            below(
                runs.seeds,
                f"{words} {when}",
                runs.of(arm, value),
                runs.of(other, value),
            )
            for when, value in (("a step", final_loss), (f"after {seconds:.0f} s", later))
        ]

    others = ("top-1", "top-2", "top-4", "ReMoE", "expert threshold")
    return [
        *better("Top-2 is better than top-1", "top-2", "top-1"),
        *better("Smaller experts are better: top-4 than top-2", "top-4", "top-2"),
        *better("ReMoE is better than top-4", "ReMoE", "top-4"),
        below(
            runs.seeds,
            f"ReMoE ends within {NEAR:.0%} of as many experts a token as top-4",
            _miss(runs, "ReMoE", "top-4"),
            lambda seed: NEAR,
        ),
        *better("Expert threshold is better than top-4", "expert threshold", "top-4"),
        below(
            runs.seeds,
            f"It ends within {NEAR:.0%} of as many experts a token as top-4",
            _miss(runs, "expert threshold", "top-4"),
            lambda seed: NEAR,
        ),
        below(
            runs.seeds,
            "It has no loss for it and less violation than top-4 with the global-batch loss",
            runs.of("expert threshold", violation),
            runs.of("top-4", violation),
        ),
        *(
            below(
                runs.seeds,
                f"PEER is better than the best of the others {when}",
                runs.of("PEER", value),
                runs.least(others, value),
            )
            for when, value in (("a step", final_loss), (f"after {seconds:.0f} s", later))
        ),
    ]


def inequalities(arms: Mapping[str, Sequence[Json]]) -> str:
    """Say where active parameters are not equal; empty where an arm that it needs is not there."""
    if not arms.keys() >= {"top-4", "ReMoE", "PEER"}:
        return ""
    ended, target = (statistics.fmean(map(num_chosen, arms[arm])) for arm in ("ReMoE", "top-4"))
    active, equal = (arms[arm][0]["active_params"] for arm in ("PEER", "top-4"))
    return (
        f"Not all is equal: ReMoE ended at {ended:.2f} of the {target:g} experts a token that its "
        f"active parameters count, and PEER has {active / equal - 1:.0%} more active parameters "
        f"than top-4, for its queries."
    )


def _miss(runs: Runs, arm: str, target: str) -> Measure:
    """Return by what share of it an arm misses the number of experts of another."""

    def miss(seed: int) -> float:
        ours, theirs = (num_chosen(runs.by_run[name, seed]) for name in (arm, target))
        return abs(ours - theirs) / theirs

    return miss
