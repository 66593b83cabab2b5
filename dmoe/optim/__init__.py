"""Optimizer, parameter groups and learning-rate schedules."""

from dmoe.optim.adamw import OptimConfig, build_optimizer, parameter_groups
from dmoe.optim.schedule import ScheduleConfig, learning_rate_factor

__all__ = [
    "OptimConfig",
    "ScheduleConfig",
    "build_optimizer",
    "learning_rate_factor",
    "parameter_groups",
]
