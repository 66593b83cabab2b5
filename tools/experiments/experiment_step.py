"""A training step of an arm, to be timed. Called by the speed measurements of the experiments."""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from dmoe.engine import NativeEngine, StepPosition
from dmoe.parallel import ParallelDims
from dmoe.trainer.config import Config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from training_throughput import random_batch


def training_step(config: Config) -> Callable[[], None]:
    """Return a training step on random tokens in one process, of a new number each time."""
    train = config.train
    engine = NativeEngine(
        config.engine,
        model=config.model,
        optim=config.optim,
        dims=ParallelDims(),
        device=torch.device("cpu"),
        seed=0,
    )
    batches = [replace(random_batch(config), index=i) for i in range(train.num_micro_batches)]
    steps = count()

    def run() -> None:
        at = StepPosition(0, next(steps), train.global_batch_size, train.num_micro_batches)
        result = engine.forward_backward(batches, at)
        engine.clip(config.optim.max_grad_norm)
        engine.step(config.optim.lr, result)

    return run
