"""Which claims of the papers of 2017 to 2021 show in the language runs of `classics.py`.

Called by `classics_report.py`. A claim is judged in each seed, or by the spread of the seeds.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from classics_arms import ARMS, FACTORS, GRID, PLAIN
from experiment_page import (
    Claim,
    Json,
    Runs,
    below,
    differ_less_than_seeds,
    falls,
    varies_less,
)

EVEN = 2.0
"""Largest load over the mean load from which on the load is called very uneven."""

_GRID_ARMS = list(ARMS["importance and load"])
_NONE, _WITH_LOSS = _GRID_ARMS[0], _GRID_ARMS[1:]
_BY_WEIGHTS = dict(zip(GRID, _GRID_ARMS, strict=True))
_CAPACITIES = [f"capacity {factor:g}" for factor in FACTORS]
_BF16, _SCALE_1, _SCALE_01 = "router in bfloat16", "initial scale 1", "initial scale 0.1"


def loss(row: Json) -> float:
    """Return the held-out loss at the end."""
    return row["loss"]


def early_loss(row: Json) -> float:
    """Return the held-out loss early on."""
    return row["early_loss"]


def perplexity(row: Json) -> float:
    """Return the perplexity a byte."""
    return math.exp(row["loss"])


def cv_importance(row: Json) -> float:
    """Return the coefficient of variation of the importance."""
    return math.sqrt(row["moe/importance_loss"])


def cv_load(row: Json) -> float:
    """Return the coefficient of variation of the smooth load."""
    return math.sqrt(row["moe/load_loss"])


def max_load(row: Json) -> float:
    """Return the largest load over the mean load."""
    return row["moe/load_max_over_mean_mean"]


def dropped(row: Json) -> float:
    """Return the share of the tokens that are dropped."""
    return row["moe/drop_frac_mean"]


def of_importance_and_load(rows: Iterable[Json]) -> list[Claim]:
    """Judge what arXiv 1701.06538 says of the two losses."""
    runs = Runs(rows)
    weights = sorted((w for w in GRID if w[0] == w[1] and w[1]), key=lambda w: w[1])
    by_weight = [_BY_WEIGHTS[pair] for pair in weights]
    importance, load = _BY_WEIGHTS[0.2, 0], _BY_WEIGHTS[0, 0.2]
    measured = {"CV(importance)": cv_importance, "CV(load)": cv_load, "max / mean load": max_load}
    return [
        below(
            runs.seeds,
            f"Without either loss the load is very uneven: max / mean load above {EVEN:g}",
            lambda seed: EVEN,
            runs.of(_NONE, max_load),
        ),
        *(
            below(
                runs.seeds,
                f"Each loss, and both, lower {name}: the highest of those arms against none",
                runs.most(_WITH_LOSS, value),
                runs.of(_NONE, value),
            )
            for name, value in measured.items()
        ),
        below(
            runs.seeds,
            "The load loss alone lowers max / mean load more than the importance loss alone",
            runs.of(load, max_load),
            runs.of(importance, max_load),
        ),
        falls(
            runs.seeds,
            f"Max / mean load falls with both weights, {_listed(pair[1] for pair in weights)}",
            [runs.of(arm, max_load) for arm in by_weight],
        ),
        below(
            runs.seeds,
            "Perplexity is better with each loss than without: the worst of those arms against "
            "none",
            runs.most(_WITH_LOSS, perplexity),
            runs.of(_NONE, perplexity),
        ),
        below(
            runs.seeds,
            "The same of the best of those arms",
            runs.least(_WITH_LOSS, perplexity),
            runs.of(_NONE, perplexity),
        ),
    ]


def of_capacity(rows: Iterable[Json]) -> list[Claim]:
    """Judge what a larger capacity factor should do."""
    runs = Runs(rows)
    smallest, largest = _CAPACITIES[0], _CAPACITIES[-1]
    return [
        falls(
            runs.seeds,
            f"Fewer tokens are dropped with each larger factor, {_listed(FACTORS)}",
            [runs.of(arm, dropped) for arm in _CAPACITIES],
        ),
        falls(
            runs.seeds,
            "The loss improves with each larger factor",
            [runs.of(arm, loss) for arm in _CAPACITIES],
        ),
        *(
            below(
                runs.seeds,
                f"Factor {wide:g} is better than {narrow:g}",
                runs.of(f"capacity {wide:g}", loss),
                runs.of(f"capacity {narrow:g}", loss),
            )
            for narrow, wide in [*pairwise(FACTORS), (FACTORS[0], FACTORS[-1])]
        ),
        below(
            runs.seeds,
            f"Dropping nothing is better than {largest.replace('capacity', 'factor')}",
            runs.of(PLAIN, loss),
            runs.of(largest, loss),
        ),
        below(
            runs.seeds,
            f"It is better than {smallest.replace('capacity', 'factor')}",
            runs.of(PLAIN, loss),
            runs.of(smallest, loss),
        ),
    ]


def of_precision(rows: Iterable[Json]) -> list[Claim]:
    """Judge what Switch says of the precision of the router, as far as the router alone can."""
    runs = Runs(rows)
    float32, bfloat16 = runs.of(PLAIN, loss), runs.of(_BF16, loss)
    return [
        below(
            runs.seeds,
            "A router in bfloat16 diverges: its loss at the end is above its early loss",
            runs.of(_BF16, early_loss),
            bfloat16,
        ),
        below(runs.seeds, "A router in float32 is better", float32, bfloat16),
        varies_less(
            runs.seeds,
            "A router in float32 varies less from seed to seed (standard deviation)",
            float32,
            bfloat16,
        ),
        differ_less_than_seeds(
            runs.seeds,
            "The two differ by less than the seeds of float32: bfloat16 minus float32 against "
            "their standard deviation",
            bfloat16,
            float32,
        ),
    ]


def of_scale(rows: Iterable[Json]) -> list[Claim]:
    """Judge what Switch says of the scale of the initial weights."""
    runs = Runs(rows)
    claims = []
    for when, value in (("early", early_loss), ("at the end", loss)):
        small, large = runs.of(_SCALE_01, value), runs.of(_SCALE_1, value)
        claims += [
            below(runs.seeds, f"Scale 0.1 is better than 1 {when}", small, large),
            below(
                runs.seeds, f"Against the paper: scale 1 is better than 0.1 {when}", large, small
            ),
            varies_less(
                runs.seeds,
                f"Scale 0.1 varies less than 1 from seed to seed {when} (standard deviation)",
                small,
                large,
            ),
        ]
    return claims


def _listed(numbers: Iterable[float]) -> str:
    texts: Sequence[str] = [f"{number:g}" for number in numbers]
    return f"{', '.join(texts[:-1])} and {texts[-1]}"
