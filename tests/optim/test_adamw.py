"""The optimizer: which parameters decay, state before the first step, and one step by hand."""

import pytest
import torch
from torch import nn

from dmoe.optim import OptimConfig, build_optimizer


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def step_with_gradient(model: nn.Module, config: OptimConfig, value: float) -> None:
    optimizer = build_optimizer(model.parameters(), config)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()


def test_only_matrices_decay() -> None:
    """With a gradient of zero, a parameter moves by its decay alone."""
    model, config = small_model(), OptimConfig(lr=0.5, weight_decay=0.2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_with_gradient(model, config, 0.0)
    for name, parameter in model.named_parameters():
        kept = 1 - 0.5 * 0.2 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name])


def test_first_step_is_the_sign_of_the_gradient() -> None:
    """Bias correction makes both moments those of the one gradient: g / (|g| + eps)."""
    model, config = small_model(), OptimConfig(lr=0.01, weight_decay=0.0, eps=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    step_with_gradient(model, config, -0.5)
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old + 0.01 * 0.5 / (0.5 + 1e-3))


def test_state_is_there_before_the_first_step() -> None:
    model = small_model()
    optimizer = build_optimizer(model.parameters(), OptimConfig())
    assert len(optimizer.state) == len(list(model.parameters()))
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 0
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_state_made_beforehand_does_not_change_training() -> None:
    ours, theirs = small_model(), small_model()
    config = OptimConfig(lr=0.02, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=config.betas,
    )
    optimizer = build_optimizer(ours.parameters(), config)
    tokens = torch.tensor([0, 3, 3, 1])
    for _ in range(3):
        for model, steps in ((ours, optimizer), (theirs, reference)):
            model(tokens).square().sum().backward()
            steps.step()
            steps.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.9)])
def test_betas_outside_their_range_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        OptimConfig(betas=betas)
