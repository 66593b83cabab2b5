"""One optimizer step: gradients, the one global norm, and the decision to take or skip the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmoe.data import MicroBatch
from dmoe.engine import Engine, StepPosition, StepResult
from dmoe.optim import learning_rate_factor
from dmoe.trainer.config import Config
from dmoe.trainer.nonfinite import NonFiniteError, find_non_finite
from dmoe.trainer.progress import Progress


@dataclass(frozen=True)
class StepRecord:
    """What one step did; equal on every rank."""

    result: StepResult
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    skipped: bool


def train_step(
    config: Config, engine: Engine, batches: Sequence[MicroBatch], progress: Progress
) -> StepRecord:
    """Train on one global batch, of which `batches` are this rank's, and count it in `progress`.

    A loss or gradient that is not finite on any rank is seen by all, since both are summed over the
    ranks; the step is then skipped everywhere, and parameters, moments, schedule and biases stay.

    Raises:
        NonFiniteError: on every rank, after too many skipped steps in a row.
    """
    train = config.train
    position = StepPosition(
        config.run.seed, progress.step, train.global_batch_size, train.num_micro_batches
    )
    result = engine.forward_backward(batches, position)
    grad_norm = engine.clip(config.optim.max_grad_norm)
    schedule = config.optim.schedule
    factor = learning_rate_factor(schedule, progress.optimizer_steps, train.steps)
    lr = config.optim.lr * factor
    finite = math.isfinite(result.loss) and math.isfinite(grad_norm)
    progress.step += 1
    progress.tokens += result.num_tokens
    progress.eval_loss = None
    if finite:
        progress.skipped_in_a_row = 0
        engine.step(lr, result)
    else:
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= train.max_skipped_steps:
            raise NonFiniteError(
                f"the loss ({result.loss}) or gradient norm ({grad_norm}) was not finite for "
                f"{progress.skipped_in_a_row} steps in a row (train.max_skipped_steps), up to step "
                f"{progress.step}; {find_non_finite(engine, batches, position)}"
            )
        engine.skip()
    return StepRecord(result, grad_norm, lr, skipped=not finite)
