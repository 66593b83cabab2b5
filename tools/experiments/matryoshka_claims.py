"""What the paper and its readers say should show, judged by the results of a text.

Called by `matryoshka_report.py`. A claim is a comparison of two numbers in every case of it: each
seed, or each searched budget of each seed.
"""

import statistics
from collections.abc import Callable

from experiment_page import Claim, below
from matryoshka_arms import SWEEP, Match
from matryoshka_results import Text

Measure = Callable[[Text, int], float]
"""A number of a text and a seed, in nats a byte."""


def judge(text: Text) -> list[Claim]:
    """Return all claims, judged."""
    below = [
        (
            "Lowering k from 6 to 1 costs the layer-wise model less than the k = 6 specialist",
            _rise("layer"),
            _rise("k6"),
        ),
        (
            "The worst gap of the layer-wise model is smaller than that of the k = 6 specialist",
            _worst("layer", "tokens"),
            _worst("k6", "tokens"),
        ),
        (
            "The same at equal training FLOPs",
            _worst("layer", "flops"),
            _worst("k6", "flops"),
        ),
        (
            "The k = 2 specialist gains nothing from more experts: 2 against the best above",
            _at("k2", 2),
            _best_above("k2", 2),
        ),
        (
            "The k = 4 specialist gains nothing from more experts: 4 against the best above",
            _at("k4", 4),
            _best_above("k4", 4),
        ),
        (
            "At k = 4 the layer-wise model is better than the k = 4 specialist",
            _at("layer", 4),
            _at("k4", 4),
        ),
        (
            "At k = 6 the k = 6 specialist is better than the layer-wise model",
            _at("k6", 6),
            _at("layer", 6),
        ),
        (
            "A k for each layer is better than one a step, mean over trained k",
            _mean("layer"),
            _mean("global"),
        ),
        (
            "A k for each layer is better than one a micro-batch, mean over trained k",
            _mean("layer"),
            _mean("micro"),
        ),
        (
            "Weighted sampling is better than uniform at k = 6",
            _at("weighted", 6),
            _at("layer", 6),
        ),
        (
            "Weighted sampling is worse than uniform at k = 1",
            _at("layer", 1),
            _at("weighted", 1),
        ),
        (
            "Anchored sampling is better than uniform at k = 6",
            _at("anchored", 6),
            _at("layer", 6),
        ),
        (
            "The layer-wise model is better than top-p, mean over trained k",
            _mean("layer"),
            _mean("top_p"),
        ),
    ]
    return [_below(text, *claim) for claim in below] + [
        _searched(text, "found", "uniform", "The profile found is better than the uniform one"),
        _searched(text, "found", "front", "The profile found is better than the front-loaded one"),
        _searched(text, "found", "back", "The profile found is better than the back-loaded one"),
        _searched(text, "front", "back", "Front-loaded profiles are better than back-loaded ones"),
    ]


def _at(arm: str, k: int) -> Measure:
    """The loss of an arm at k."""
    return lambda text, seed: text.loss(arm, k, seed)


def _best_above(arm: str, k: int) -> Measure:
    """The least loss of an arm at more than k experts."""
    return lambda text, seed: min(text.loss(arm, j, seed) for j in SWEEP if j > k)


def _rise(arm: str) -> Measure:
    """What an arm loses from k = 6 to k = 1."""
    return lambda text, seed: text.loss(arm, 1, seed) - text.loss(arm, 6, seed)


def _mean(arm: str) -> Measure:
    """The mean loss of an arm over the trained k."""
    return lambda text, seed: text.mean_loss(arm, seed)


def _worst(arm: str, match: Match) -> Measure:
    """The worst gap of an arm to the specialists."""
    return lambda text, seed: text.worst_gap(arm, seed, match)


def _below(text: Text, words: str, left: Measure, right: Measure) -> Claim:
    """Judge in each seed whether one number is below another."""
    return below(
        text.all_seeds, words, lambda seed: left(text, seed), lambda seed: right(text, seed)
    )


def _searched(text: Text, better: str, worse: str, words: str) -> Claim:
    """Judge two kinds of profiles in each budget and seed that has both, and they differ."""
    rows = [row for _, row in text.searches() if {better, worse} <= row["profiles"].keys()]
    rows = [row for row in rows if row["profiles"][better] != row["profiles"][worse]]
    if not rows:
        return Claim(words, [], "")
    differences = [row["loss"][better] - row["loss"][worse] for row in rows]
    return Claim(
        words, [d < 0 for d in differences], f"{statistics.fmean(differences):+.4f} on average"
    )
