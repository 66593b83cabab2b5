"""Builds a run from its configuration: data, engine, checkpoints, and the state it resumes from."""

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dmoe.checkpoint import CheckpointError, CheckpointManager
from dmoe.checkpoint.ranks import Ranks
from dmoe.config import ConfigError, config_tree, diff_trees
from dmoe.data import (
    Dataset,
    LoaderState,
    Tokenizer,
    TokenSplit,
    TrainLoader,
    build_train_dataset,
    build_valid_split,
    check_resume,
    load_tokenizer,
)
from dmoe.engine import Engine, build_engine
from dmoe.models.precision import COMPUTE_DTYPES
from dmoe.moe.elastic import ElasticConfig
from dmoe.ops import ResolvedBackend, resolve_backend, tune_kernels
from dmoe.parallel import ParallelDims
from dmoe.trainer.config import Config
from dmoe.trainer.journal import Journal
from dmoe.trainer.loop import Trainer
from dmoe.trainer.progress import Progress

T = TypeVar("T")

# Model keys that a resumed run may change: they act on training, not on what the weights mean.
_FREE_MODEL_KEYS = (
    "model.moe.backend",
    "model.moe.capacity",
    "model.moe.dispatch",
    *(f"model.moe.elastic.{key}" for key in ElasticConfig.model_fields if key != "normalize"),
    "model.moe.losses",
    "model.moe.router.bias_update_rate",
    "model.moe.router.jitter",
)


@dataclass(frozen=True)
class Run:
    """Everything of a run but its callbacks."""

    config: Config
    dims: ParallelDims
    tokenizer: Tokenizer
    dataset: Dataset
    """Training data."""
    valid: TokenSplit
    """Held-out data."""
    trainer: Trainer
    journal: Journal


@contextmanager
def open_run(config: Config, device: torch.device) -> Iterator[Run]:
    """Build a run, at its start or where its last checkpoint left it, and close it in the end.

    Raises:
        ConfigError: data, layout or checkpoint do not fit the configuration.
    """
    config.check_world(dist.get_world_size() if dist.is_initialized() else 1)
    backend = _check_backend(config, device)
    dims = ParallelDims.create(ep=config.parallel.ep, device_type=device.type)
    train, seed, vocab_size = config.train, config.run.seed, config.model.vocab_size
    readers = {"rank": dims.rank, "world": dims.world_size}
    tokenizer = load_tokenizer(config.data.tokenizer)
    valid, dataset = _on_every_rank(
        "opening the data",
        lambda: (
            build_valid_split(config.data, vocab_size=vocab_size, **readers),
            build_train_dataset(
                config.data, seq_len=train.seq_len, vocab_size=vocab_size, seed=seed, **readers
            ),
        ),
        dims,
    )
    engine = build_engine(
        config.engine,
        model=config.model,
        optim=config.optim,
        dims=dims,
        device=device,
        seed=seed,
        recompute=train.recompute,
    )
    with ExitStack() as stack:
        _on_every_rank("locking", lambda: dims.rank or stack.enter_context(_lock(config)), dims)
        checkpoints = CheckpointManager(config.run.folder / "checkpoints", config.checkpoint)
        stack.callback(checkpoints.close)
        parts = _resume(config, checkpoints, engine, dataset)
        progress = Progress.restore(parts["progress"]) if parts else Progress()
        loader = stack.enter_context(
            TrainLoader(
                dataset,
                global_batch_size=train.global_batch_size,
                micro_batch_size=train.micro_batch_size,
                start_sample=parts["data"]["samples_consumed"] if parts else 0,
                **readers,
            )
        )
        journal = Journal(config, rank=dims.rank, step=progress.step)
        stack.callback(journal.close)
        _introduce(config, dims, backend, journal, parts)
        if config.engine.tune_kernels:
            tune_kernels(journal.message)
            stack.callback(tune_kernels, None)
        trainer = Trainer(
            config, engine=engine, loader=loader, checkpoints=checkpoints, progress=progress
        )
        try:
            yield Run(config, dims, tokenizer, dataset, valid, trainer, journal)
        except BaseException as error:
            journal.status("failed", progress.step, error=f"{type(error).__name__}: {error}")
            if dims.rank:  # what only this rank has seen would go unsaid
                print(f"rank {dims.rank}: {error}", file=sys.stderr)
            raise


@contextmanager
def _lock(config: Config) -> Iterator[None]:
    """Keep other processes out of the run folder, until this one ends in whatever way."""
    config.run.folder.mkdir(parents=True, exist_ok=True)
    with (config.run.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training in {config.run.folder}: wait for it, or choose "
                f"another run.name",
                key="run.name",
            ) from None
        yield


def _on_every_rank(what: str, action: Callable[[], T], dims: ParallelDims) -> T:
    """Call `action`, and raise on every rank what it raises on any: rank 0 tells the user."""
    try:
        return Ranks(dims.world_group).run(what, action)
    except CheckpointError as error:
        raise error.__cause__ or ConfigError(str(error)) from None


def _resume(
    config: Config, checkpoints: CheckpointManager, engine: Engine, dataset: Dataset
) -> dict[str, Any] | None:
    """Load the checkpoint to continue from, if there is one, and return its parts."""
    if config.checkpoint.resume == "never" and checkpoints.latest():
        raise ConfigError(
            f"{config.run.folder} already holds checkpoints, and checkpoint.resume is 'never': "
            f"choose another run.name, or set checkpoint.resume=auto to continue"
        )

    def check(parts: dict[str, Any]) -> None:
        _check_model(parts["config"], config)
        check_resume(LoaderState.model_validate(parts["data"]), dataset)

    state = engine.state()
    parts = checkpoints.resume(state, check)
    if parts is not None:
        engine.load_state(state, parts["optimizer"])
    return parts


def _check_model(saved: dict[str, Any], config: Config) -> None:
    for key, old, new in diff_trees(saved, config_tree(config)):
        if key.startswith("model.") and not key.startswith(_FREE_MODEL_KEYS):
            raise ConfigError(
                f"{key} was {old} when the checkpoint was saved and is now {new}: the weights are "
                f"those of another model; set it back, or choose another run.name"
            )


def _check_backend(config: Config, device: torch.device) -> ResolvedBackend | None:
    """Return what experts run on, None without a choice; what cannot run here is told now."""
    moe, taken = config.model.moe, None
    if moe is not None:
        leaf, dtype = moe.leaf, COMPUTE_DTYPES[config.engine.precision]
        taken = resolve_backend(leaf.backend, device, dtype, leaf.expert_dtype)
    is_grouped = moe is not None and moe.is_grouped
    if config.engine.tune_kernels and not (is_grouped and taken == "triton"):
        reason = "this model has no routed experts in grouped products: set it to false"
        if moe is not None and is_grouped:
            key = f"model.moe.{moe.leaf_path}backend"
            reason = f"{key} takes {taken} here: set it to false, or {key} to triton"
        raise ConfigError(
            f"engine.tune_kernels = true is for the Triton kernels of experts, but {reason}",
            key="engine.tune_kernels",
        )
    if moe is None or is_grouped:
        return taken
    # A space of neurons has torch and the kernels to choose from, other layers have torch.
    if moe.leaf.infinite is None:
        return None
    return taken if taken == "triton" else "torch"


def _introduce(
    config: Config,
    dims: ParallelDims,
    backend: ResolvedBackend | None,
    journal: Journal,
    parts: dict[str, Any] | None,
) -> None:
    """Print the layout, and where a resumed run stands."""
    moe = config.model.moe
    journal.message(dims.describe(moe.num_leaves if moe and moe.num_shards else 0))
    if moe is not None and moe.warning:
        journal.message(f"WARNING: {moe.warning}")
    if moe is not None and backend and moe.leaf.backend == "auto":
        journal.message(f"model.moe.{moe.leaf_path}backend: auto takes {backend}")
    if parts is None:
        return
    steps = config.train.steps
    journal.message(f"resumed at step {parts['progress']['step']} of {steps}")
    for key, old, new in diff_trees(parts["config"], config_tree(config)):
        journal.message(f"changed since the checkpoint: {key}: {old} -> {new}")
