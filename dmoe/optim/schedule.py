"""Learning-rate schedules: pure functions of the number of optimizer steps taken."""

import math
from typing import Literal

from pydantic import Field, NonNegativeInt

from dmoe.config.base import ConfigModel


class ScheduleConfig(ConfigModel):
    """How the learning rate runs over training: a linear warm-up, then one of four shapes."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """"wsd" is warmup-stable-decay: constant, then linear over the last `decay_fraction`."""
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 to the full rate."""
    final_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Rate at the last step, as a fraction of the full rate."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of all steps in which "wsd" decays."""


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the rate of optimizer step `step` (from 0), as a fraction of the full rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant":
        return 1.0
    start = config.warmup_steps
    if config.name == "wsd":
        start = max(start, total_steps - round(config.decay_fraction * total_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1 - progress
    return config.final_fraction + (1 - config.final_fraction) * shape
