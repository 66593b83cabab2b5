"""What the runs of an experiment share: a text, plans, and processes that train and measure arms.

Files of a text, below the output folder: `text.json`, `store/`, `runs/` (the library's run
folders), `logs/`, and a file a run in `plans/`, written when it begins, and in `results/`, when it
is complete. Called by the experiments beside this file.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer

from dmoe.checkpoint import LoadedModel
from dmoe.config import ConfigError
from dmoe.data import (
    MicroBatch,
    bigram_baseline,
    build_train_dataset,
    build_valid_split,
    eval_batches,
    prepare,
)
from dmoe.data.corpora import BUILTIN_STDLIB
from dmoe.evaluation import evaluate_split
from dmoe.train import train
from dmoe.trainer.config import Config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from harness import machine

HOLDOUT = 0.06
"""Share of the paragraphs of a text that is held out; the built-in corpus has its own."""
EVAL_SEQUENCES = 16
"""Sequences of a forward pass of a measurement."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a run is, to the last detail; what was begun with another plan is not gone on with."""

    folder: Path
    """Of the text."""
    arm: str
    seed: int
    steps: int
    eval_tokens: int
    """Held-out tokens to measure on, from the first; all if there are fewer."""
    overrides: tuple[str, ...]
    """For all arms."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def base(self) -> Path:
        """The YAML file that all arms stand on."""
        raise NotImplementedError

    def arm_config(self, overrides: Sequence[str]) -> Config:
        """Return the configuration of the arm."""
        raise NotImplementedError

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
        return plain | {"base": hashlib.sha256(self.base.read_bytes()).hexdigest()}

    def config(self) -> Config:
        """Return the configuration of the run."""
        place = [
            f"run.dir={json.dumps(str(self.folder / 'runs'))}",
            f"run.name={self.name}",
            f"run.seed={self.seed}",
            f"train.steps={self.steps}",
        ]
        return self.arm_config([*self.overrides, *place])


P = TypeVar("P", bound=Plan)
Measure = Callable[[P, Config], Json]
"""Measures a trained run."""


def prepare_text(
    out: Path,
    data: Path | None,
    title: str | None,
    config_of: Callable[[Sequence[str]], Config],
) -> tuple[Path, list[str]]:
    """Make the token store of a text, unless it is there, and describe it in `text.json`.

    Args:
        out: output folder of the experiment.
        data: a .txt file, or a folder of such; None for the built-in corpus.
        title: what the report calls it; the name of the file if None.
        config_of: makes a configuration of the experiment from overrides.

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
        write_json(folder / "text.json", _describe(title, config_of(overrides)))
    return folder, overrides


def perform_all(plans: Sequence[P], measure: Measure[P], jobs: int, threads: int) -> None:
    """Perform plans in processes of their own; what fails is told, and the others go on.

    Args:
        plans: those that are done already are left out.
        measure: a function of a module, as it goes to other processes by name.
        jobs: runs at a time.
        threads: of each run.

    Raises:
        ConfigError: a run was begun with another plan; nothing is done then.
        typer.Exit: a run has failed.
    """
    plans = [plan for plan in plans if not is_done(plan)]
    began, failed = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _set_up, (threads,)) as pool:
        futures: dict[Future[None], Plan] = {
            pool.submit(perform, plan, measure): plan for plan in plans
        }
        for number, future in enumerate(as_completed(futures), start=1):
            error, minutes = future.exception(), (time.monotonic() - began) / 60
            failed += error is not None
            state = f"failed: {error!r}" if error else "done"
            name = futures[future].name
            print(f"{number}/{len(plans)} {name} {state} ({minutes:.1f} min)", flush=True)
    if failed:
        print(f"{failed} runs failed; the same command makes them again", file=sys.stderr)
        raise typer.Exit(1)


def perform(plan: P, measure: Measure[P]) -> None:
    """Train (or go on, or take what is trained) and measure, and write the result.

    Raises:
        ConfigError: the run was begun with another plan.
    """
    if is_done(plan):
        return
    write_json(plan.begun, plan.record())
    config = plan.config()
    log = plan.folder / "logs" / f"{plan.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file):
        train(config)
    numbers = measure(plan, config)
    at = {"machine": machine(), "date": str(date.today())}
    write_json(plan.result, {"plan": plan.record(), **at, **numbers})


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


def held_out_loss(loaded: LoadedModel, config: Config, eval_tokens: int) -> float:
    """Return the loss on the first tokens of the held-out text, in nats a byte."""
    return evaluate_split(
        loaded.model,
        build_valid_split(config.data, vocab_size=config.model.vocab_size),
        seq_len=config.train.seq_len,
        micro_batch_size=EVAL_SEQUENCES,
        mask_documents=config.data.mask_documents,
        max_batches=math.ceil(eval_tokens / (EVAL_SEQUENCES * config.train.seq_len)),
    ).loss


def held_out_batches(config: Config, num: int) -> list[MicroBatch]:
    """Return the first micro-batches of the held-out text."""
    return list(
        eval_batches(
            build_valid_split(config.data, vocab_size=config.model.vocab_size),
            seq_len=config.train.seq_len,
            micro_batch_size=EVAL_SEQUENCES,
            vocab_size=config.model.vocab_size,
            mask_documents=config.data.mask_documents,
            max_batches=num,
        )
    )


def metrics_rows(config: Config) -> list[Json]:
    """Return what the run wrote of its steps that were logged, and of its evaluations."""
    return [json.loads(line) for line in (config.run.folder / "metrics.jsonl").open()]


def names_of(given: str, known: Collection[str]) -> list[str]:
    """Return the names of a list with commas.

    Raises:
        ConfigError: one is not known.
    """
    names = given.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is none of {', '.join(known)}")
    return names


def write_json(path: Path, value: Json) -> None:
    """Write a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.rename(path)


def _set_up(threads: int) -> None:
    """Prepare a process: all runs are on the CPU, also where there is a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(threads)


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
