"""The configuration that the trainer's tests start from, and a way to run it on any layout."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.evaluation import EvalResult, evaluate_split
from dmoe.trainer.build import Run, open_run
from dmoe.trainer.callbacks import Evaluate, SaveCheckpoints
from dmoe.trainer.config import Config
from dmoe.trainer.loop import Callback, Trainer
from dmoe.trainer.step import StepRecord

STEPS = 6
SAVE_EVERY = 3

Tree = dict[str, Any]


class InterruptedTrainingError(Exception):
    """Stands for a process that dies."""


def tiny_config(store: Path, folder: Path, **sections: Tree) -> Config:
    """Return a float64 run with everything that has state: moments, schedule, bias, jitter."""
    router = {"name": "top_k", "top_k": 2, "bias_update_rate": 0.01, "jitter": 0.05}
    moe = {"num_experts": 8, "expert_ffn_dim": 16, "router": router, "num_dense_layers": 1}
    tree: Tree = {
        "run": {"name": "tiny", "dir": str(folder), "seed": 1},
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "moe": moe},
        "engine": {"precision": "fp64"},
        "data": {"sources": [{"path": str(store)}]},
        "optim": {"lr": 1e-2, "schedule": {"warmup_steps": 2}},
        "train": {
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "seq_len": 32,
            "max_skipped_steps": 2,
        },
        "checkpoint": {"every": SAVE_EVERY, "keep_last": 9},
        "eval": {"every": SAVE_EVERY},
        "metrics": {"log_every": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Config.model_validate(tree)


class Watch(Callback):
    """Records what must be the same in another run, and dies where it is told to."""

    def __init__(self, die_after: int | None = None):
        self.die_after = die_after
        self.rows: dict[int, Tree] = {}

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        progress = trainer.progress
        self.rows[progress.step] = {
            "loss": record.result.loss,
            "aux": record.result.aux_losses,
            "counts": record.result.counts_LE.tolist(),
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "skipped": record.skipped,
            "tokens": progress.tokens,
            "eval_loss": progress.eval_loss,
            "samples": trainer.loader.state().samples_consumed,
        }
        if progress.step == self.die_after:
            raise InterruptedTrainingError


def run_tiny(
    config: Config, die_after: int | None = None, also: Callback | None = None
) -> tuple[dict[int, Tree], dict[str, Tensor]]:
    """Train (or go on training) and return the rows of this process and the whole final state."""
    watch = Watch(die_after)
    with open_run(config, torch.device("cpu")) as run:
        with suppress(InterruptedTrainingError):
            evaluate = Evaluate(config, run.journal, lambda max_batches: _measure(run))
            others = [] if also is None else [also]
            run.trainer.fit([*others, evaluate, SaveCheckpoints(), watch])
        state = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
            for name, tensor in run.trainer.engine.state().items()
        }
    return watch.rows, state


def _measure(run: Run) -> EvalResult:
    train, model = run.config.train, run.trainer.engine.model
    sizes = {"seq_len": train.seq_len, "micro_batch_size": train.micro_batch_size}
    return evaluate_split(model, run.valid, **sizes, dims=run.dims)
