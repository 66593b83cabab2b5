"""The three losses of 1991 on a task of four regimes: who specialises, and how soon it is learned.

Each quadrant of the plane has a linear map of its own, with noise. Four linear experts under a
linear gate can learn it exactly; a network with one hidden layer and as many parameters is the
comparison that the paper makes. Called by `classics.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.moe.adaptive import AdaptiveMixture, MixtureOutput, regression_loss

OBJECTIVES = ("cooperative", "competitive", "likelihood")
SYSTEMS = (*OBJECTIVES, "one network")
SEEDS = range(5)
EPOCHS, CASES, LR = 600, 512, 0.1
"""An epoch is one step of Adam on all cases."""
NOISE, SPREAD = 1.0, 10.0
"""Standard deviation of the noise, which the likelihood takes to be 1, and of the coefficients."""
CRITERION = 0.05
"""Squared error on new cases, as a share of their variance, at which the task counts as learned."""

Json = dict[str, Any]


def perform(system: str, seed: int) -> Json:
    """Train one system and return what was measured on new cases."""
    generator = torch.Generator().manual_seed(seed)
    maps = SPREAD * torch.randn(4, 3, generator=generator)
    x, targets, _ = cases(maps, generator)
    new_x, new_targets, new_regime = cases(maps, generator)
    torch.manual_seed(seed)
    model = build(system)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    errors, variance = [], new_targets.var().item()
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        loss_of(model, x, targets, system).backward()
        optimizer.step()
        with torch.no_grad():
            error = (predict(model, new_x) - new_targets).square().mean().item()
        errors.append(error / variance)
    learned = [epoch for epoch, error in enumerate(errors, start=1) if error <= CRITERION]
    row: Json = {
        "system": system,
        "seed": seed,
        "error": errors[-1],
        "epochs": learned[0] if learned else None,
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
    }
    if isinstance(model, AdaptiveMixture):
        row |= specialisation(model, new_x, new_targets, new_regime)
        row["alone"] /= variance
    return row


def cases(maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (T, 2) inputs, (T, 1) targets, and the (T,) quadrant of each case."""
    x = 2 * torch.rand(CASES, 2, generator=generator) - 1
    regime = 2 * (x[:, 0] > 0) + (x[:, 1] > 0)
    inputs = torch.cat([x, torch.ones(CASES, 1)], dim=1)
    targets = (inputs * maps[regime]).sum(1, keepdim=True)
    noise = NOISE * torch.randn(CASES, 1, generator=generator)
    return x, targets + noise, regime


def build(system: str) -> nn.Module:
    """Build four experts under a gate, 24 parameters, or a network of 25."""
    if system == "one network":
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    return AdaptiveMixture([nn.Linear(2, 1) for _ in range(4)], nn.Linear(2, 4))


def loss_of(model: nn.Module, x: Tensor, targets: Tensor, system: str) -> Tensor:
    """Return the loss that the system learns by."""
    if not isinstance(model, AdaptiveMixture):
        return (model(x) - targets).square().sum(-1).mean()
    return regression_loss(model(x), targets, system)


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
