"""OLMoE (arXiv 2409.02060): dropless, its gates plain probabilities, with z-loss."""

import math

import pytest
import torch
from narrow_presets import (
    assert_gates_are,
    expert,
    logs,
    small,
    training,
    weighted,
    with_few_experts,
)
from torch import Tensor


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Plain probabilities, which need not sum to 1."""
    probs, ids_TK = logits_TE.softmax(-1).topk(k)
    return ids_TK, probs


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("olmoe_1b_7b", gates)


def test_losses_and_capacity_are_those_of_the_paper() -> None:
    """Table 1: dropless, balance 1e-2, z-loss 1e-3."""
    config = small("olmoe_1b_7b")
    assert config.capacity is None
    assert (config.losses.load_balance_weight, config.losses.z_loss_weight) == (0.01, 0.001)


def test_no_token_is_dropped_however_many_want_the_same_experts() -> None:
    """64 tokens alike: experts 0 and 1 serve them all, and y = 0.5 E_0(x) + 0.3 E_1(x)."""
    x_TD = logs([[0.5, 0.3, 0.1, 0.1]] * 64)
    layer = with_few_experts("olmoe_1b_7b", 4, "router.top_k=2")
    y_TD, output = layer(x_TD, training(64))
    want_D = 0.5 * expert(layer, 0, x_TD[0]) + 0.3 * expert(layer, 1, x_TD[0])
    torch.testing.assert_close(y_TD, want_D.expand(64, 4))
    assert output.stats.counts_E.tolist() == [64, 64, 0, 0]
    assert output.stats.dropped == 0
    with_capacity = with_few_experts("olmoe_1b_7b", 4, "router.top_k=2", "capacity.factor=1.25")
    assert with_capacity(x_TD, training(64))[1].stats.dropped == 2 * (64 - 40)


def test_what_is_added_to_the_cross_entropy_by_hand() -> None:
    """Two sequences of a token, balanced as one micro-batch; the logarithms of Z are 0 and log 7.

    f = (1/4, 1/2, 1/4, 0) and P = (0.3, 0.4, 0.2, 0.1): 4 x 0.325 = 1.3, and not 1.6 for each.
    """
    layer = with_few_experts("olmoe_1b_7b", 4, "router.top_k=2")
    x_TD = logs([[0.5, 0.3, 0.1, 0.1], [0.1, 0.5, 0.3, 0.1]])
    x_TD[1] += math.log(7)
    _, output = layer(x_TD, training(2, seq_len=1))
    assert weighted(layer, output) == pytest.approx(0.01 * 1.3 + 0.001 * math.log(7) ** 2 / 2)
