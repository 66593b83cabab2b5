"""One run of the Matryoshka experiment: train an arm, measure it, keep the numbers as JSON.

Files of a text, below the output folder: `text.json`, `store/`, `runs/` (the library's run
folders), `logs/`, and a file a run in `plans/`, written when it begins, and in `results/`, when it
is complete. Called by `matryoshka.py`, in processes of their own. Shape letter: L MoE layers.
"""

import hashlib
import json
import math
import re
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from matryoshka_arms import BASE, K_MAX, SWEEP, Match, arm_config, ramp, training_flops

from dmoe.checkpoint import LoadedModel, load_model
from dmoe.config import ConfigError, config_tree
from dmoe.data import (
    bigram_baseline,
    build_train_dataset,
    build_valid_split,
    eval_batches,
    prepare,
)
from dmoe.data.corpora import BUILTIN_STDLIB
from dmoe.evaluation import (
    calibration_batches,
    evaluate_split,
    expert_similarity,
    router_agreement,
    search_profile,
)
from dmoe.evaluation.costs import expert_costs
from dmoe.train import train
from dmoe.trainer.config import Config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from harness import machine

HOLDOUT = 0.06
"""Share of the paragraphs of a text that is held out; the built-in corpus has its own."""
EVAL_SEQUENCES = 16
"""Sequences of a forward pass of a measurement."""
SEARCHED = "layer"
"""The arm for which profiles are searched."""
SUMS = (6, 8, 12, 16, 20)
"""Budgets of the search: experts a token, over all layers."""
CALIBRATION_BATCHES = 8
COMPARED_K = (1, 6)
"""Two numbers of experts at which the rankings of a router are compared."""
COMPARED_BATCHES = 4

Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a run is, to the last detail; what was begun with another plan is not gone on with."""

    folder: Path
    """Of the text."""
    arm: str
    seed: int
    match: Match
    steps: int
    eval_tokens: int
    """Held-out tokens to measure on, from the first; all if there are fewer."""
    overrides: tuple[str, ...] = ()
    """For all arms."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"{self.arm}-{self.match}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """Where the numbers go."""
        return self.folder / "results" / f"{self.name}.json"

    @property
    def begun(self) -> Path:
        """Where the plan itself is kept."""
        return self.folder / "plans" / f"{self.name}.json"

    def record(self) -> Json:
        """Return the plan as plain data, with the base configuration it stands on."""
        plain = json.loads(json.dumps(asdict(self) | {"folder": None}))
        return plain | {"base": hashlib.sha256(BASE.read_bytes()).hexdigest()}

    def config(self) -> Config:
        """Return the configuration of the run."""
        place = [
            f"run.dir={json.dumps(str(self.folder / 'runs'))}",
            f"run.name={self.name}",
            f"run.seed={self.seed}",
            f"train.steps={self.steps}",
        ]
        return arm_config(self.arm, [*self.overrides, *place])


def prepare_text(out: Path, data: Path | None, title: str | None) -> tuple[Path, list[str]]:
    """Make the token store of a text, unless it is there, and describe it in `text.json`.

    Args:
        out: output folder of the experiment.
        data: a .txt file, or a folder of such; None for the built-in corpus.
        title: what the report calls it; the name of the file if None.

    Returns:
        The folder of the text, and the overrides that make a configuration read it.
    """
    if title is None:
        title = data.stem if data else "Source files of Python's standard library (built in)"
    folder = out / re.sub(r"\W+", "_", title.lower()).strip("_")
    store = folder / "store"
    if data is None:
        source = BUILTIN_STDLIB
    else:
        prepare([data], store, holdout=HOLDOUT, split_paragraphs=True)
        source = str(store)
    overrides = [
        f"data.sources={json.dumps([{'path': source}])}",
        f"data.cache_dir={json.dumps(str(store))}",
    ]
    if not (folder / "text.json").exists():
        _write(folder / "text.json", _describe(title, arm_config("k1", overrides)))
    return folder, overrides


def perform(plan: Plan) -> None:
    """Train (or go on, or take what is trained) and measure, and write the result.

    Raises:
        ConfigError: the run was begun with another plan.
    """
    if is_done(plan):
        return
    _write(plan.begun, plan.record())
    config = plan.config()
    log = plan.folder / "logs" / f"{plan.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file):
        train(config)
    numbers = _measure(plan, config)
    at = {"machine": machine(), "date": str(date.today())}
    _write(plan.result, {"plan": plan.record(), **at, **numbers})


def is_done(plan: Plan) -> bool:
    """Say whether the result of a plan is there.

    Raises:
        ConfigError: the run was begun with another plan.
    """
    found = json.loads(plan.begun.read_text()) if plan.begun.exists() else {}
    for key, value in plan.record().items():
        if found.get(key, value) != value:
            raise ConfigError(
                f"{plan.name} in {plan.folder} was begun with {key} = {found[key]}, and now it is "
                f"{value}: choose another --out, or delete that folder"
            )
    return plan.result.exists()


def _measure(plan: Plan, config: Config) -> Json:
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
    loaded: LoadedModel, config: Config, plan: Plan, k: int | tuple[int, ...] | None
) -> float:
    """Return the loss on held-out text at k, in nats a byte."""
    with loaded.model.at_k(k):
        return evaluate_split(
            loaded.model,
            build_valid_split(config.data, vocab_size=config.model.vocab_size),
            seq_len=config.train.seq_len,
            micro_batch_size=EVAL_SEQUENCES,
            mask_documents=config.data.mask_documents,
            max_batches=math.ceil(plan.eval_tokens / (EVAL_SEQUENCES * config.train.seq_len)),
        ).loss


def _compare(loaded: LoadedModel, config: Config) -> Json:
    """Return how alike the rankings of the routers are at two k, and the experts of a layer."""
    batches = list(
        eval_batches(
            build_valid_split(config.data, vocab_size=config.model.vocab_size),
            seq_len=config.train.seq_len,
            micro_batch_size=EVAL_SEQUENCES,
            vocab_size=config.model.vocab_size,
            mask_documents=config.data.mask_documents,
            max_batches=COMPARED_BATCHES,
        )
    )
    return {
        "agreement_L": router_agreement(loaded.model, batches, *COMPARED_K),
        "similarity_L": expert_similarity(loaded.model, batches),
    }


def _search(loaded: LoadedModel, config: Config, plan: Plan) -> list[Json]:
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
    rows = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").open()]
    means = [row["moe/k_mean_mean"] for row in rows if "moe/k_mean_mean" in row]
    return sum(means) / len(means)


def _describe(title: str, config: Config) -> Json:
    """Return the sizes of a text, and what byte bigrams reach on it, in nats a byte."""
    sizes = {"vocab_size": config.model.vocab_size}
    dataset = build_train_dataset(config.data, seq_len=config.train.seq_len, seed=0, **sizes)
    valid = build_valid_split(config.data, **sizes)
    bigrams = bigram_baseline(
        dataset.split, valid, mask_documents=config.data.mask_documents, **sizes
    )
    return {
        "title": title,
        "train_tokens": dataset.split.num_tokens,
        "held_out_tokens": valid.num_tokens,
        "bigram_loss": bigrams.loss,
    }


def _write(path: Path, value: Json) -> None:
    """Write a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.rename(path)
