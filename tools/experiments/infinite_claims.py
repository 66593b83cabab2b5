"""What the paper says should show, and what of ours should, judged by the results of a text.

Called by `infinite_report.py`. A claim is a comparison of two numbers in each seed.
"""

import statistics
from collections.abc import Callable

from experiment_page import Claim, below
from infinite_arms import SWEEP_ARMS, TRAINED_SAMPLES, arms_of
from infinite_results import Text

Measure = Callable[[Text, int], float]
"""A number of a text and a seed."""

EARLY = 0.25
"""Share of the training after which the entropy should be stable."""
STABLE, HIGH = 0.02, 0.9
"""By how much it may change from there on, and where it should be."""


def of_paper(text: Text) -> list[Claim]:
    """Return the claims of the paper (arXiv 2601.17680), judged."""
    neuron = _loss("neuron")
    return [
        _below(
            text,
            "Neuron is better than the dense model of as many active",
            "neuron",
            "dense_active",
        ),
        _below(text, "Neuron is better than Switch", "neuron", "switch"),
        _below(text, "Neuron is better than top-2 of 4", "neuron", "top2"),
        _below(
            text, "Neuron is as good as the dense model of as many in all", "neuron", "dense_total"
        ),
        _judge(
            text,
            "At one sample neuron is better than top-2 of 4 at one expert",
            _at("neuron", 1),
            _at("top2", 1),
        ),
        _judge(
            text,
            "Going from 2 to 1 costs neuron less than top-2 of 4",
            _rise("neuron"),
            _rise("top2"),
        ),
        _judge(text, "At 4 samples neuron is better than at 2", _at("neuron", 4), _at("neuron", 2)),
        _judge(text, "At 8 samples neuron is better than at 4", _at("neuron", 8), _at("neuron", 4)),
        *(
            _judge(
                text,
                f"d_z = {wide} is better than {narrow}",
                _loss(SWEEP_ARMS[wide]),
                _loss(SWEEP_ARMS[narrow]),
            )
            for narrow, wide in ((4, 16), (16, 64), (64, 128))
        ),
        _judge(
            text,
            f"The entropy of the selection changes by less than {STABLE} after {EARLY:.0%} of the "
            f"training, in every layer",
            _change_of_entropy,
            lambda text, seed: STABLE,
        ),
        _judge(
            text,
            f"It is above {HIGH} at the end, in every layer",
            lambda text, seed: HIGH,
            _least_entropy,
        ),
        _judge(
            text,
            "A mixture of Gaussians is better than one (future work in the paper)",
            _loss("mixture"),
            neuron,
        ),
    ]


def of_ours(text: Text) -> list[Claim]:
    """Return what we add to the paper, judged."""
    return [
        _below(text, "Block is better than top-2 of 4", "block", "top2"),
        _below(text, "Block is better than Switch", "block", "switch"),
        _below(text, "Block is better than neuron", "block", "neuron"),
        _judge(
            text,
            "z = mean at inference is better than two samples",
            _at("neuron", "mean"),
            _at("neuron", TRAINED_SAMPLES),
        ),
        _judge(
            text,
            "At one sample block is better than top-2 of 4 at one expert",
            _at("block", 1),
            _at("top2", 1),
        ),
        *(
            _judge(
                text,
                f"Deep, {name.removeprefix('deep_')}, is better than neuron",
                _loss(name),
                _loss("neuron"),
            )
            for name in arms_of("deep")
        ),
    ]


def _loss(arm: str) -> Measure:
    """The loss of an arm as it was trained."""
    return lambda text, seed: text.loss(arm, seed)


def _at(arm: str, number: int | str) -> Measure:
    """The loss of an arm at a number of samples or experts."""
    return lambda text, seed: text.at(arm, number, seed)


def _rise(arm: str) -> Measure:
    """What an arm loses from two samples or experts to one."""
    return lambda text, seed: text.at(arm, 1, seed) - text.at(arm, 2, seed)


def _change_of_entropy(text: Text, seed: int) -> float:
    """Return the largest change of a layer's entropy after the first part of the training."""
    curve = text.curve("neuron", "load_entropy", seed)
    late = [values_L for step, values_L in curve.items() if step >= EARLY * max(curve)]
    return max(max(layer) - min(layer) for layer in zip(*late, strict=True))


def _least_entropy(text: Text, seed: int) -> float:
    """Return the entropy of the layer that has least, mean over the last five steps logged."""
    curve = text.curve("neuron", "load_entropy", seed)
    return min(statistics.fmean(layer) for layer in zip(*[*curve.values()][-5:], strict=True))


def _below(text: Text, words: str, better: str, worse: str) -> Claim:
    """Judge whether the loss of an arm is below that of another."""
    return _judge(text, words, _loss(better), _loss(worse))


def _judge(text: Text, words: str, left: Measure, right: Measure) -> Claim:
    """Judge in each seed whether one number is below another."""
    return below(
        text.all_seeds, words, lambda seed: left(text, seed), lambda seed: right(text, seed)
    )
