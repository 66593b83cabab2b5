"""One run of the Matryoshka experiment: what it is, and how it is measured once it is trained.

Called by `matryoshka.py`, in processes of their own. Shape letter: L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment_runs import (
    EVAL_SEQUENCES,
    Json,
    Plan,
    held_out_batches,
    held_out_loss,
    metrics_rows,
)
from matryoshka_arms import BASE, K_MAX, SWEEP, Match, arm_config, ramp, training_flops

from dmoe.checkpoint import LoadedModel, load_model
from dmoe.config import config_tree
from dmoe.data import build_train_dataset
from dmoe.evaluation import (
    calibration_batches,
    expert_similarity,
    router_agreement,
    search_profile,
)
from dmoe.evaluation.costs import expert_costs
from dmoe.trainer.config import Config

SEARCHED = "layer"
"""The arm for which profiles are searched."""
SUMS = (6, 8, 12, 16, 20)
"""Budgets of the search: experts a token, over all layers."""
CALIBRATION_BATCHES = 8
COMPARED_K = (1, 6)
"""Two numbers of experts at which the rankings of a router are compared."""
COMPARED_BATCHES = 4


@dataclass(frozen=True)
class MatryoshkaPlan(Plan):
    """A run of this experiment."""

    match: Match

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"{self.arm}-{self.match}-seed{self.seed}"

    @property
    def base(self) -> Path:
        """The YAML file that all arms stand on."""
        return BASE

    def arm_config(self, overrides: Sequence[str]) -> Config:
        """Return the configuration of the arm."""
        return arm_config(self.arm, overrides)


def measure(plan: MatryoshkaPlan, config: Config) -> Json:
    """Return the numbers of a trained run."""
    loaded = load_model(config.run.folder)
    result: Json = {
        "config": config_tree(config),
        "tokens": plan.steps * config.train.global_batch_size * config.train.seq_len,
        "training_flops": training_flops(config),
        "k_mean_in_training": _k_mean(config),
        "loss": {k: _held_out(loaded, config, plan, k) for k in SWEEP},
        **_compare(loaded, config),
    }
    if config.model.moe.router.name == "top_p":
        result["own_loss"] = _held_out(loaded, config, plan, None)
    if plan.arm == SEARCHED and plan.match == "tokens":
        result["search"] = _search(loaded, config, plan)
    return result


def _held_out(
    loaded: LoadedModel, config: Config, plan: MatryoshkaPlan, k: int | tuple[int, ...] | None
) -> float:
    """Return the loss on held-out text at k, in nats a byte."""
    with loaded.model.at_k(k):
        return held_out_loss(loaded, config, plan.eval_tokens)


def _compare(loaded: LoadedModel, config: Config) -> Json:
    """Return how alike the rankings of the routers are at two k, and the experts of a layer."""
    batches = held_out_batches(config, COMPARED_BATCHES)
    return {
        "agreement_L": router_agreement(loaded.model, batches, *COMPARED_K),
        "similarity_L": expert_similarity(loaded.model, batches),
    }


def _search(loaded: LoadedModel, config: Config, plan: MatryoshkaPlan) -> list[Json]:
    """Return, for each budget, the profile that was found and those by hand, on held-out text."""
    dataset = build_train_dataset(
        config.data,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        seed=config.run.seed,
    )
    batches = calibration_batches(dataset, CALIBRATION_BATCHES, EVAL_SEQUENCES)
    costs, num_layers = expert_costs(config.model, K_MAX), len(config.model.moe_layers)
    rows = []
    for total in SUMS:
        if not num_layers <= total <= num_layers * K_MAX:
            continue
        found = search_profile(loaded.model, batches, costs, total)
        profiles = {
            "found": found.k_L,
            "front": ramp(total, num_layers, front=True),
            "back": ramp(total, num_layers, front=False),
        }
        if total % num_layers == 0:
            profiles["uniform"] = (total // num_layers,) * num_layers
        rows.append(
            {
                "sum": total,
                "profiles": profiles,
                "loss": {
                    name: _held_out(loaded, config, plan, k_L) for name, k_L in profiles.items()
                },
                "calibration_loss": found.loss,
                "calibration_targets": found.num_targets,
                "num_measured": found.num_measured,
            }
        )
    return rows


def _k_mean(config: Config) -> float:
    """Return the mean number of experts a token had in the steps that were logged."""
    means = [row["moe/k_mean_mean"] for row in metrics_rows(config) if "moe/k_mean_mean" in row]
    return sum(means) / len(means)
