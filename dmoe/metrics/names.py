"""The names of all metrics: the one table from keys of metrics.jsonl to names in TensorBoard.

The x axis is the optimizer step. Names are never changed: dashboards and scripts rely on them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """One metric of a run."""

    key: str
    """In a row of metrics.jsonl."""

    tensorboard: str
    """Name of the scalar in TensorBoard."""

    meaning: str
    """What it is, with its unit."""


METRICS = (
    Metric("loss", "train/loss", "cross-entropy alone, mean of the global batch; nats a token"),
    Metric("ppl", "train/ppl", "perplexity, exp(loss)"),
    Metric(
        "aux_loss",
        "train/aux_loss",
        "load-balancing loss without its weight, mean over layers; 1 is balanced",
    ),
    Metric("z_loss", "train/z_loss", "router z-loss without its weight, mean over layers"),
    Metric("lr", "train/lr", "learning rate of the first parameter group"),
    Metric("grad_norm", "train/grad_norm", "global gradient norm before clipping"),
    Metric("skipped", "train/skipped", "steps skipped so far for a loss or gradient not finite"),
    Metric("tokens", "data/tokens", "tokens trained on so far"),
    Metric("tokens_per_second", "perf/tok_s", "training tokens a second, all ranks together"),
    Metric("mfu_active", "perf/mfu_active", "share of peak FLOPs, counting active parameters; 0-1"),
    Metric("k_sum", "moe/k_sum", "experts a token in all MoE layers together, dropped ones too"),
    Metric("step_seconds", "perf/step_s", "mean seconds a step"),
    Metric("data_seconds", "perf/data_s", "mean seconds a step spent waiting for data"),
    Metric("eval_loss", "eval/loss", "held-out cross-entropy; nats a token"),
    Metric("memory_gib", "mem/peak_gib", "peak memory of rank 0, of its GPU if it has one; GiB"),
    Metric("eval_bits_per_byte", "eval/bits_per_byte", "held-out cross-entropy; bits a byte"),
)

MOE_STATISTICS = {
    "load_cv": "standard deviation of assignments an expert, over their mean; 0 is balanced",
    "load_max_over_mean": "assignments of the fullest expert, over the mean; 1 is balanced",
    "entropy": "entropy of a token's router scores over its maximum, mean over tokens; 0-1",
    "load_entropy": "entropy of the shares of assignments over its maximum; 1 is balanced",
    "dead_frac": "fraction of experts without an assignment; 0-1",
    "drop_frac": "fraction of assignments dropped for lack of capacity; 0-1",
    "bias_absmax": "largest magnitude of the balancing bias",
    "k_mean": "mean number of experts a token, dropped ones too",
    "active": "continuous experts: neurons or blocks that a token uses, as a fraction of all; 0-1",
    "overlap": "continuous experts: share of a mask that another sample's mask has, too; 0-1",
    "sigma": "continuous experts: standard deviation of z, mean over tokens and dims",
    "sigma_std": "standard deviation of that sigma over tokens and dims",
}
"""Statistics of one MoE layer. Rows hold `moe/{name}_{mean,max}` over layers and, in detail,
`moe/layer_{i}/{name}`; in TensorBoard they have the same names."""

CUSTOM_SCALARS = {
    "overview": {
        "loss": ["Multiline", ["train/loss", "eval/loss.*"]],
        "throughput": ["Multiline", ["perf/tok_s"]],
    },
    "moe": {
        name: ["Multiline", [f"moe/{name}_mean", f"moe/{name}_max"]] for name in MOE_STATISTICS
    },
}
"""Charts of TensorBoard's custom scalars page; a chart's lines are given as regular expressions."""

_TENSORBOARD = {metric.key: metric.tensorboard for metric in METRICS}
_NOT_SCALARS = ("step", "k", "non_finite")


def tensorboard_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of a metrics.jsonl row under their TensorBoard names.

    Evaluations at several numbers of active experts are several curves: a row with `k` has it in
    its names, as in `eval/loss_k4`, or `eval/loss_k2-4` for one number a layer.

    Raises:
        KeyError: A key is not in the table above.
    """
    k = row.get("k")
    suffix = "" if k is None else "_k" + "-".join(map(str, k if isinstance(k, list) else [k]))
    return {
        key if key.startswith("moe/") else _TENSORBOARD[key] + suffix: value
        for key, value in row.items()
        if key not in _NOT_SCALARS and value is not None
    }
