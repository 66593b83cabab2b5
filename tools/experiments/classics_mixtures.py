"""The three losses of 1991 on a task of four regimes: who specialises, and how soon it is learned.

Cases come in four clusters, each with a linear map of its own, and noise. Four linear experts under
a linear gate can learn that; a network with one hidden layer and as many parameters is the
comparison that the paper makes. Called by `classics.py`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmoe.moe.adaptive import AdaptiveMixture, MixtureOutput, regression_loss

OBJECTIVES = ("cooperative", "competitive", "likelihood")
SYSTEMS = (*OBJECTIVES, "one network")
SEEDS = range(10)
TUNING_SEEDS = range(100, 103)
"""Those by which each system's setting is chosen; the page has none of them."""
EPOCHS, CASES = 600, 256
"""An epoch is one step of Adam on all cases."""
NOISE, SPREAD = 0.1, 0.3
"""Standard deviations of the noise and of a cluster; coefficients of the maps have 1."""
CRITERION = 0.05
"""Squared error on new cases, as a share of their variance, at which the task counts as learned."""

Json = dict[str, Any]


class Setting(NamedTuple):
    """What is chosen for each system."""

    lr: float
    unit: float
    """Targets are multiplied by it in the loss, whose Gaussians have a deviation of 1."""


def settings_of(system: str) -> list[Setting]:
    """Return the settings to choose from; the unit makes a difference to the likelihood alone."""
    units = (1.0, 3.0, 10.0) if system == "likelihood" else (1.0,)
    return [Setting(*pair) for pair in itertools.product((0.03, 0.1, 0.3), units)]


def best_setting(system: str, tuning: Sequence[Json]) -> Setting:
    """Return the setting with the fewest epochs; among those that never learn, the least error."""
    rows = [row for row in tuning if row["system"] == system]
    best = min(rows, key=lambda row: (row["epochs"], row["error"]))
    return Setting(best["lr"], best["unit"])


def tune(system: str, setting: Setting) -> Json:
    """Return the mean epochs of a setting until learned, all of them where that is never."""
    rows = [perform(system, seed, setting) for seed in TUNING_SEEDS]
    return {
        "system": system,
        **setting._asdict(),
        "epochs": sum(row["epochs"] or EPOCHS for row in rows) / len(rows),
        "error": sum(row["error"] for row in rows) / len(rows),
    }


def perform(system: str, seed: int, setting: Setting) -> Json:
    """Train one system and return what was measured on new cases."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(4, 3, generator=generator)
    x, targets, _ = cases(maps, generator)
    new_x, new_targets, new_regime = cases(maps, generator)
    torch.manual_seed(seed)
    model = build(system)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    errors, variance = [], new_targets.var().item()
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        loss_of(model, x, targets, system, setting.unit).backward()
        optimizer.step()
        with torch.no_grad():
            error = (predict(model, new_x) - new_targets).square().mean().item()
        errors.append(error / variance)
    learned = [epoch for epoch, error in enumerate(errors, start=1) if error <= CRITERION]
    row: Json = {
        "system": system,
        "seed": seed,
        **setting._asdict(),
        "error": errors[-1],
        "epochs": learned[0] if learned else None,
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
    }
    if isinstance(model, AdaptiveMixture):
        row |= specialisation(model, new_x, new_targets, new_regime)
        row["alone"] /= variance
    return row


def cases(maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (T, 2) inputs, (T, 1) targets, and the (T,) cluster of each case."""
    regime = torch.arange(CASES) % 4
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    x = corners[regime] + SPREAD * torch.randn(CASES, 2, generator=generator)
    inputs = torch.cat([x, torch.ones(CASES, 1)], dim=1)
    targets = (inputs * maps[regime]).sum(1, keepdim=True)
    noise = NOISE * torch.randn(CASES, 1, generator=generator)
    return x, targets + noise, regime


def build(system: str) -> nn.Module:
    """Build four experts under a gate, 24 parameters, or a network of 25."""
    if system == "one network":
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    return AdaptiveMixture([nn.Linear(2, 1) for _ in range(4)], nn.Linear(2, 4))


def loss_of(model: nn.Module, x: Tensor, targets: Tensor, system: str, unit: float) -> Tensor:
    """Return the loss that the system learns by."""
    if not isinstance(model, AdaptiveMixture):
        return (model(x) - targets).square().sum(-1).mean()
    output = model(x)
    scaled = output._replace(outputs_TEO=unit * output.outputs_TEO)
    return regression_loss(scaled, unit * targets, system)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Return (T, 1) predictions."""
    return model.predict(x) if isinstance(model, AdaptiveMixture) else model(x)


@torch.no_grad()
def specialisation(model: AdaptiveMixture, x: Tensor, targets: Tensor, regime: Tensor) -> Json:
    """Return how sure the gate is, how many experts it uses, and what one expert alone can do."""
    output: MixtureOutput = model(x)
    best = output.gates_TE.argmax(1)
    alone = output.outputs_TEO[torch.arange(len(x)), best]
    joint = torch.zeros(4, 4)
    joint.index_put_((regime, best), torch.ones(len(x)), accumulate=True)
    joint /= len(x)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    used = joint > 0
    return {
        "gate": output.gates_TE.amax(1).mean().item(),
        "num_used": int((joint.sum(0) > 0.05).sum()),
        "alone": (alone - targets).square().mean().item(),
        "information": (joint[used] * (joint[used] / apart[used]).log2()).sum().item(),
    }
