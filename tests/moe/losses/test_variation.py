"""Importance, load and their squared coefficients of variation, by hand."""

import pytest
import torch

from dmoe.moe.losses.variation import gates_of_experts, squared_variation, variation_losses


def test_squared_variation_by_hand() -> None:
    """1, 3 have mean 2 and variance 1."""
    assert squared_variation(torch.tensor([1.0, 3.0])).item() == 0.25
    assert squared_variation(torch.full((4,), 7.0)).item() == 0


def test_importance_by_hand() -> None:
    ids_TK = torch.tensor([[0, 2], [2, -1], [-1, -1]])
    weights_TK = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]])
    assert gates_of_experts(ids_TK, weights_TK, 3).sum(0).tolist() == [0.75, 0, 1.25]


def test_the_loss_is_the_mean_over_groups() -> None:
    """Two micro-batches, of a group each, and then as two groups of one."""
    amounts_GE = torch.tensor([[1.0, 3.0], [4.0, 4.0]])
    shares = [variation_losses({"load": amount_E[None]}, 2)["load"] for amount_E in amounts_GE]
    assert sum(shares).item() == pytest.approx((0.25 + 0) / 2)
    assert variation_losses({"load": amounts_GE}, 2)["load"].item() == pytest.approx(0.25 / 2)


def test_an_amount_of_nothing_has_no_loss_and_no_gradient() -> None:
    amount_E = torch.zeros(3, requires_grad=True)
    loss = squared_variation(amount_E)
    loss.backward()
    assert loss.item() == 0
    assert not amount_E.grad.any()
