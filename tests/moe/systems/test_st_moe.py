"""ST-MoE (arXiv 2202.08906): two experts a token, and a loss that keeps logits small."""

import math

import pytest
import torch
from narrow_presets import CONFIGS, assert_gates_are, small, training, weighted, with_few_experts
from torch import Tensor

from dmoe.config import load_config


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The probabilities of the chosen, divided by their sum."""
    probs, ids_TK = logits_TE.softmax(-1).topk(k)
    return ids_TK, probs / probs.sum(-1, keepdim=True)


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("st_moe", gates)


def test_losses_and_capacity_are_those_of_the_paper() -> None:
    """Capacity 1.25 and 2.0, balance 1e-2, z-loss 1e-3; every fourth layer has experts."""
    config = small("st_moe")
    assert (config.capacity.factor, config.capacity.eval_factor) == (1.25, 2.0)
    assert (config.losses.load_balance_weight, config.losses.z_loss_weight) == (0.01, 0.001)
    assert load_config(CONFIGS / "st_moe.yaml", ["model.num_layers=12"]).model.moe_layers == [
        3,
        7,
        11,
    ]


def test_the_z_loss_by_hand() -> None:
    """Eq. 5: the exponentials sum to 4 and 6; the gradient of a logit is 2 / 2 log Z times p."""
    layer = with_few_experts("st_moe", 4)
    x_TD = torch.tensor([[1.0, 1, 1, 1], [3, 1, 1, 1]], dtype=torch.float64).log().requires_grad_()
    loss = layer(x_TD, training(2))[1].losses["z"]
    assert loss.item() == pytest.approx((math.log(4) ** 2 + math.log(6) ** 2) / 2)
    [first, second] = torch.autograd.grad(loss, x_TD)[0].tolist()
    assert first == pytest.approx([math.log(4) / 4] * 4)
    assert second == pytest.approx([math.log(6) * p for p in (1 / 2, 1 / 6, 1 / 6, 1 / 6)])


def test_what_is_added_to_the_cross_entropy_by_hand() -> None:
    """Eq. 6, the same tokens: both go to experts 0 and 1, which have 3/8 and 5/24 of P.

    So the balance loss is 4 (1/2 x 3/8 + 1/2 x 5/24) = 7/6.
    """
    layer = with_few_experts("st_moe", 4)
    x_TD = torch.tensor([[1.0, 1, 1, 1], [3, 1, 1, 1]], dtype=torch.float64).log()
    _, output = layer(x_TD, training(2))
    z = (math.log(4) ** 2 + math.log(6) ** 2) / 2
    assert weighted(layer, output) == pytest.approx(0.01 * 7 / 6 + 0.001 * z)
