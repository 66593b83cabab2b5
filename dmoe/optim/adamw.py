"""AdamW (arXiv 1711.05101) over the parameters of a model, with decay on matrices only."""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.config.base import ConfigModel
from dmoe.optim.schedule import ScheduleConfig

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(ConfigModel):
    """The optimizer, its schedule and gradient clipping."""

    name: Literal["adamw"] = "adamw"
    """AdamW with decoupled weight decay."""
    lr: PositiveFloat = 1e-3
    """Full learning rate, which the schedule scales."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    max_grad_norm: NonNegativeFloat = 1.0
    """The global gradient norm is clipped to this; 0 for no clipping."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """Learning rate over time."""


def parameter_groups(parameters: Iterable[Tensor], config: OptimConfig) -> list[dict[str, object]]:
    """Return groups for AdamW: matrices and the rest, which does not decay."""
    groups: dict[tuple[bool, object], list[Tensor]] = {}
    for parameter in parameters:
        # One fused call takes tensors of one kind: plain ones, or DTensors of one mesh.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim > 1, mesh), []).append(parameter)
    return [
        {"params": members, "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (is_matrix, _), members in groups.items()
    ]


def build_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW with its state in place, so that it can be saved and loaded before any step."""
    optimizer = torch.optim.AdamW(
        parameter_groups(parameters, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer
