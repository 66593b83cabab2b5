"""Builds a run from its configuration: data, engine, checkpoints, and the state it resumes from."""

from dataclasses import dataclass
from typing import Any

import torch

from dmoe.checkpoint import CheckpointManager
from dmoe.config import ConfigError, config_tree, diff_trees
from dmoe.data import (
    LoaderState,
    Tokenizer,
    TokenSplit,
    TrainLoader,
    build_train_dataset,
    build_valid_split,
    check_resume,
    load_tokenizer,
)
from dmoe.data.packing import Dataset
from dmoe.engine import NativeEngine
from dmoe.parallel import ParallelDims
from dmoe.trainer.config import Config
from dmoe.trainer.journal import Journal
from dmoe.trainer.loop import Trainer
from dmoe.trainer.progress import Progress

# Keys of the model that a resumed run may change: they act on training, not on what the weights
# are.
_FREE_MODEL_KEYS = (
    "moe.backend",
    "moe.capacity",
    "moe.dispatch",
    "moe.losses",
    "moe.router.bias_update_rate",
    "moe.router.jitter",
)


@dataclass(frozen=True)
class Run:
    """Everything of a run but its callbacks."""

    config: Config
    dims: ParallelDims
    device: torch.device
    tokenizer: Tokenizer
    valid: TokenSplit
    trainer: Trainer
    journal: Journal

    def close(self) -> None:
        """End threads and close files."""
        self.trainer.loader.close()
        self.trainer.checkpoints.close()


def build_run(config: Config, device: torch.device) -> Run:
    """Build a run, at its start or where its last checkpoint left it.

    Raises:
        ConfigError: data, layout or checkpoint do not fit the configuration.
    """
    dims = ParallelDims.create(ep=config.parallel.ep, device_type=device.type)
    config.check_world(dims.world_size)
    train = config.train
    where = {"rank": dims.rank, "world": dims.world_size}
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.vocab_size
    dataset = build_train_dataset(
        config.data, seq_len=train.seq_len, vocab_size=vocab_size, seed=config.run.seed, **where
    )
    valid = build_valid_split(config.data, vocab_size=vocab_size, **where)
    engine = NativeEngine(
        config.engine,
        model=config.model,
        optim=config.optim,
        dims=dims,
        device=device,
        seed=config.run.seed,
        recompute=train.recompute,
    )
    checkpoints = CheckpointManager(config.run.folder / "checkpoints", config.checkpoint)
    if config.checkpoint.resume == "never" and checkpoints.latest():
        raise ConfigError(
            f"{config.run.folder} already holds checkpoints, and checkpoint.resume is 'never': "
            f"choose another run.name, or checkpoint.resume=auto to continue"
        )
    parts = checkpoints.resume(engine.state())
    progress, start_sample, changes = Progress(), 0, []
    if parts is not None:
        changes = _check_config(parts["config"], config)
        progress, start_sample = _restore(parts, engine, dataset)
    loader = TrainLoader(
        dataset,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        start_sample=start_sample,
        **where,
    )
    journal = Journal(config, rank=dims.rank, step=progress.step)
    moe = config.model.moe
    journal.message(dims.describe(moe.num_experts if moe else 0))
    if parts is not None:
        journal.message(f"resumed at step {progress.step} of {train.steps}")
    for key, old, new in changes:
        journal.message(f"changed since the checkpoint: {key}: {old} -> {new}")
    trainer = Trainer(
        config, engine=engine, loader=loader, checkpoints=checkpoints, progress=progress
    )
    return Run(config, dims, device, tokenizer, valid, trainer, journal)


def _restore(parts: dict[str, Any], engine: NativeEngine, dataset: Dataset) -> tuple[Progress, int]:
    """Take back the parts of a checkpoint whose tensors are loaded."""
    state = LoaderState.model_validate(parts["data"])
    check_resume(state, dataset)
    engine.load_parts(parts["optimizer"])
    return Progress.restore(parts["progress"]), state.samples_consumed


def _check_config(saved: dict[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """Return what changed since the checkpoint was saved.

    Raises:
        ConfigError: a key of the model that its weights depend on has another value.
    """
    changes = diff_trees(saved, config_tree(config))
    for key, old, new in changes:
        section, _, rest = key.partition(".")
        if section == "model" and not rest.startswith(_FREE_MODEL_KEYS):
            raise ConfigError(
                f"{key} was {old} when the checkpoint was saved and is now {new}: the weights "
                f"are those of another model; restore it, or choose another run.name"
            )
    return changes
