"""The rule that says which checkpoints are deleted after a save. Pure; manager applies it."""

import math
from collections.abc import Mapping


def best_step(eval_losses: Mapping[int, float | None]) -> int | None:
    """Return the step of lowest finite evaluation loss (the earliest of equals), or None."""
    measured = [
        (loss, step)
        for step, loss in eval_losses.items()
        if loss is not None and math.isfinite(loss)
    ]
    return min(measured)[1] if measured else None


def expired_steps(
    eval_losses: Mapping[int, float | None],
    latest: int,
    *,
    keep_last: int,
    keep_every: int,
    keep_best: bool,
) -> list[int]:
    """Return the steps to delete, in ascending order.

    Args:
        eval_losses: evaluation loss, or None, of every saved step.
        latest: the step just saved. Later ones were abandoned by a rollback; they stay until the
            run passes them again.
        keep_last: how many steps up to `latest` are kept, at least 1.
        keep_every: steps that are multiples of it are kept; 0 keeps none for this reason.
        keep_best: whether the step of lowest evaluation loss is kept.
    """
    steps = sorted(step for step in eval_losses if step <= latest)
    kept: set[int | None] = {latest, *steps[-keep_last:]}
    if keep_every:
        kept |= {step for step in steps if step % keep_every == 0}
    if keep_best:
        kept.add(best_step(eval_losses))
    return [step for step in steps if step not in kept]
