"""One run of the infinity-MoE experiment, measured: held-out loss at every number of samples.

Top-k arms are measured at every number of experts instead. Called by `infinite.py`, in processes of
their own. Shape letter: L MoE layers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from experiment_runs import (
    Json,
    Plan,
    held_out_batches,
    held_out_loss,
    metrics_rows,
)
from infinite_arms import ARMS, BASE, FEW_SAMPLES, SAMPLES, arm_config

from dmoe.checkpoint import LoadedModel, load_model
from dmoe.config import config_tree
from dmoe.evaluation.perplexity import inputs_of
from dmoe.metrics.moe_stats import dead_fraction, load_entropy
from dmoe.models.counts import num_active_params, num_params
from dmoe.trainer.config import Config

USAGE_BATCHES = 1
"""Held-out micro-batches on which the use of neurons is measured."""
CURVES = ("load_entropy", "dead_frac", "sigma", "sigma_std", "overlap", "active")
"""Statistics of each layer that are kept from the metrics of training."""


@dataclass(frozen=True)
class InfinitePlan(Plan):
    """A run of this experiment."""

    @property
    def base(self) -> Path:
        """The YAML file that all arms stand on."""
        return BASE

    def arm_config(self, overrides: Sequence[str]) -> Config:
        """Return the configuration of the arm."""
        return arm_config(self.arm, overrides)


def measure(plan: Plan, config: Config) -> Json:
    """Return the numbers of a trained run."""
    loaded = load_model(config.run.folder)
    return {
        "config": config_tree(config),
        "tokens": plan.steps * config.train.global_batch_size * config.train.seq_len,
        "num_params": num_params(config.model),
        "num_active_params": num_active_params(config.model),
        "loss": json.loads((config.run.folder / "status.json").read_text())["eval_loss"],
        "at": _at_each(loaded, config, plan),
        "curves": _curves(config),
    }


def _at_each(loaded: LoadedModel, config: Config, plan: Plan) -> Json:
    """Return loss and use of neurons at each number of samples, or of experts; {} if dense.

    These losses are of the first held-out tokens; the arm's own one is of all.
    """
    moe, model = config.model.moe, loaded.model
    results: Json = {}
    if moe is None:
        return results
    if moe.infinite is None:
        for k in range(1, moe.experts + 1):
            with model.at_k(k):
                results[str(k)] = {"loss": held_out_loss(loaded, config, plan.eval_tokens)}
                results[str(k)] |= _usage(loaded, config)
        return results
    for samples in SAMPLES if ARMS[plan.arm].group == "compared" else FEW_SAMPLES:
        model.set_samples(samples)
        results[str(samples)] = {"loss": held_out_loss(loaded, config, plan.eval_tokens)}
        results[str(samples)] |= _usage(loaded, config)
    return results


@torch.no_grad()
def _usage(loaded: LoadedModel, config: Config) -> Json:
    """Return, of each layer, the entropy of the selection, what is dead, and means over tokens."""
    batches = held_out_batches(config, USAGE_BATCHES)
    outputs = [loaded.model(inputs_of(batch)).moe for batch in batches]
    num_tokens = sum(int(batch.valid_BS.sum()) for batch in batches)
    counts_LE = sum(torch.stack([layer.stats.counts_E for layer in output]) for output in outputs)
    assert isinstance(counts_LE, torch.Tensor)
    names = outputs[0][0].stats.sums
    return {
        "load_entropy_L": load_entropy(counts_LE).tolist(),
        "dead_frac_L": dead_fraction(counts_LE).tolist(),
        "k_mean_L": (counts_LE.sum(1) / num_tokens).tolist(),
        "means_L": {
            name: [
                sum(float(output[layer].stats.sums[name]) for output in outputs) / num_tokens
                for layer in range(len(outputs[0]))
            ]
            for name in names
        },
    }


def _curves(config: Config) -> list[Json]:
    """Return loss and statistics of the layers at each step that was logged."""
    kept = []
    for row in metrics_rows(config):
        if "loss" not in row:
            continue
        point: Json = {"step": row["step"], "loss": row["loss"]}
        for name in CURVES:
            values = [
                row[key]
                for layer in range(config.model.num_layers)
                if (key := f"moe/layer_{layer}/{name}") in row
            ]
            if values:
                point[f"{name}_L"] = values
        kept.append(point)
    return kept
