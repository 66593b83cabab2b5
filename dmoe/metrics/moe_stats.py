"""How a run's experts are used: statistics of the routing, one number a layer, and their rows.

Counts are those of the global batch: summed over data-parallel ranks and over accumulated
micro-batches, training forwards only, and not counted again by recomputation.
Shapes: L MoE layers, E experts.
"""

from collections.abc import Sequence
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


def drop_fraction(counts_LE: ArrayLike, dropped_L: ArrayLike) -> Array:
    """Return the fraction of assignments that capacity dropped, (L,).

    Args:
        counts_LE: Assignments before any was dropped.
        dropped_L: Dropped ones.
    """
    return _ratio(_float(dropped_L), _float(counts_LE).sum(axis=1))


def moe_rows(
    counts_LE: ArrayLike,
    entropy_L: ArrayLike,
    dropped_L: ArrayLike,
    *,
    num_tokens: int,
    bias_LE: ArrayLike | None = None,
    layer_ids: Sequence[int] = (),
) -> dict[str, float]:
    """Return all statistics under their keys in metrics.jsonl.

    Args:
        counts_LE: Assignments, before any was dropped.
        entropy_L: Router entropy over its maximum, mean over the tokens.
        dropped_L: Assignments dropped.
        num_tokens: Tokens routed by each layer.
        bias_LE: Balancing biases, where the routers have them.
        layer_ids: Positions of the layers in the model for detailed rows, a key a layer; none for
            brief ones, mean and maximum over layers alone.
    """
    statistics = {
        "load_cv": load_cv(counts_LE),
        "load_max_over_mean": load_max_over_mean(counts_LE),
        "entropy": _float(entropy_L),
        "dead_frac": dead_fraction(counts_LE),
        "drop_frac": drop_fraction(counts_LE, dropped_L),
        "k_mean": _float(counts_LE).sum(axis=1) / max(num_tokens, 1),
    }
    if bias_LE is not None:
        statistics["bias_absmax"] = np.abs(_float(bias_LE)).max(axis=1)
    row: dict[str, float] = {}
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
