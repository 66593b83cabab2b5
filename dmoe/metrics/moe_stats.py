"""How a run's experts are used: statistics of the routing, one number a layer, and their rows.

Counts are those of the global batch: summed over data-parallel ranks and over accumulated
micro-batches, training forwards only, and not counted again by recomputation.
Shapes: L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def relative_load(counts_LE: ArrayLike) -> Array:
    """Return each expert's assignments over the mean of its layer, (L, E); 0 for an idle layer."""
    counts_LE = _float(counts_LE)
    return _ratio(counts_LE, counts_LE.mean(axis=1, keepdims=True))


def load_max_over_mean(counts_LE: ArrayLike) -> Array:
    """Return the assignments of the fullest expert over the mean, (L,); 1 is balanced."""
    return relative_load(counts_LE).max(axis=1)


def load_cv(counts_LE: ArrayLike) -> Array:
    """Return the coefficient of variation, standard deviation over mean, (L,); 0 is balanced."""
    return relative_load(counts_LE).std(axis=1)


def dead_fraction(counts_LE: ArrayLike) -> Array:
    """Return the fraction of experts without an assignment, (L,)."""
    return (_float(counts_LE) == 0).mean(axis=1)


def load_entropy(counts_LE: ArrayLike) -> Array:
    """Return the entropy of the shares of the assignments over its maximum, log E, (L,); 0-1.

    For a continuous space it is that of the selection distribution (arXiv 2601.17680).
    """
    counts_LE = _float(counts_LE)
    share_LE = _ratio(counts_LE, counts_LE.sum(axis=1, keepdims=True))
    log_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    return -(share_LE * log_LE).sum(axis=1) / math.log(max(2, share_LE.shape[1]))


def drop_fraction(counts_LE: ArrayLike, dropped_L: ArrayLike) -> Array:
    """Return the fraction of assignments that capacity dropped, (L,).

    Args:
        counts_LE: Assignments before any was dropped.
        dropped_L: Dropped ones.
    """
    return _ratio(_float(dropped_L), _float(counts_LE).sum(axis=1))


def statistics_within(counts_LME: ArrayLike, dropped_L: ArrayLike) -> dict[str, Array]:
    """Return statistics of the layers inside each layer, (L,) each: of the worst one, or of all.

    Args:
        counts_LME: (L, M, E) assignments of the E experts of M layers inside each layer.
        dropped_L: (L,) how many of them were dropped.
    """
    counts = _float(counts_LME)
    load = _ratio(counts, counts.mean(axis=2, keepdims=True))
    return {
        "load_max_over_mean": load.max(axis=(1, 2)),
        "dead_frac": (counts == 0).mean(axis=(1, 2)),
        "drop_frac": _ratio(_float(dropped_L), counts.sum(axis=(1, 2))),
    }


def moe_rows(
    counts_LE: ArrayLike,
    dropped_L: ArrayLike,
    means: Mapping[str, ArrayLike],
    *,
    num_tokens: int,
    biases: Sequence[ArrayLike] = (),
    layer_ids: Sequence[int] = (),
) -> dict[str, float]:
    """Return all statistics under their keys in metrics.jsonl.

    Args:
        counts_LE: Assignments, before any was dropped.
        dropped_L: Assignments dropped.
        means: Other statistics, (L,) each, mean over the tokens. Where there is NAME and
            NAME_square, the second one gives way to NAME_std, the standard deviation.
        num_tokens: Tokens routed by each layer.
        biases: All balancing biases of each layer, where the routers have them.
        layer_ids: Positions of the layers in the model for detailed rows, a key a layer; none for
            brief ones, mean and maximum over layers alone.
    """
    statistics = {
        "load_cv": load_cv(counts_LE),
        "load_max_over_mean": load_max_over_mean(counts_LE),
        "load_entropy": load_entropy(counts_LE),
        "dead_frac": dead_fraction(counts_LE),
        "drop_frac": drop_fraction(counts_LE, dropped_L),
        "k_mean": _float(counts_LE).sum(axis=1) / max(num_tokens, 1),
    }
    for name, mean_L in means.items():
        if not name.endswith("_square"):
            statistics[name] = _float(mean_L)
            continue
        name = name.removesuffix("_square")
        variance_L = _float(mean_L) - _float(means[name]) ** 2
        statistics[f"{name}_std"] = np.sqrt(variance_L.clip(min=0))
    if biases:
        statistics["bias_absmax"] = np.array([np.abs(_float(bias)).max() for bias in biases])
    row = {"k_sum": float(statistics["k_mean"].sum())}
    for name, values_L in statistics.items():
        row[f"moe/{name}_mean"] = float(values_L.mean())
        row[f"moe/{name}_max"] = float(values_L.max())
    for index, layer_id in enumerate(layer_ids):
        for name, values_L in statistics.items():
            row[f"moe/layer_{layer_id}/{name}"] = float(values_L[index])
    return row


def _ratio(numerator: Array, denominator: Array) -> Array:
    zeros = np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape))
    return np.divide(numerator, denominator, out=zeros, where=denominator != 0)


def _float(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)
