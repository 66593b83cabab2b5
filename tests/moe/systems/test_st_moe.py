"""ST-MoE (arXiv 2202.08906): two experts a token, and a loss that keeps logits small."""

import math

import pytest
import torch
from narrow_presets import CONFIGS, assert_gates_are, small, training, weighted, with_few_experts
from torch import Tensor

from dmoe.config import load_config
from dmoe.moe import MoEContext, MoELayer


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The probabilities of the chosen, divided by their sum."""
    probs, ids_TK = logits_TE.softmax(-1).topk(k)
    return ids_TK, probs / probs.sum(-1, keepdim=True)


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("st_moe", gates)


def test_losses_and_capacity_are_those_of_the_paper() -> None:
    """Balance 1e-2, z-loss 1e-3; every fourth layer has experts."""
    config = small("st_moe")
    assert (config.losses.load_balance_weight, config.losses.z_loss_weight) == (0.01, 0.001)
    assert load_config(CONFIGS / "st_moe.yaml", ["model.num_layers=12"]).model.moe_layers == [
        3,
        7,
        11,
    ]


@pytest.mark.parametrize(("in_training", "served"), [(True, 20), (False, 32)])
def test_an_expert_serves_a_multiple_of_tokens_over_experts(in_training: bool, served: int) -> None:
    """Of 1024 tokens and 64 experts: 1.25 x 16 in training and 2 x 16 outside, not of slots."""
    layer = MoELayer(small("st_moe"), dim=8).double()
    context = training(1024) if in_training else MoEContext(seq_len=1024)
    _, output = layer(torch.zeros(1024, 8).double(), context)
    assert output.stats.counts_E[:2].tolist() == [1024, 1024], "ties go to the first two"
    assert 2 * 1024 - output.stats.dropped == 2 * served


def test_the_balance_loss_counts_first_choices_by_hand() -> None:
    """Both tokens have expert 0 first, of which P is 3/8 and E 4; second choices do not count."""
    layer = with_few_experts("st_moe", 4)
    x_TD = torch.tensor([[1.0, 1, 1, 1], [3, 1, 1, 1]], dtype=torch.float64).log()
    loss = layer(x_TD, training(2))[1].losses["load_balance"]
    assert loss.item() == pytest.approx(4 * 3 / 8)


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
    """Eq. 6, the same tokens."""
    layer = with_few_experts("st_moe", 4)
    x_TD = torch.tensor([[1.0, 1, 1, 1], [3, 1, 1, 1]], dtype=torch.float64).log()
    _, output = layer(x_TD, training(2))
    z = (math.log(4) ** 2 + math.log(6) ** 2) / 2
    assert weighted(layer, output) == pytest.approx(0.01 * 4 * 3 / 8 + 0.001 * z)
