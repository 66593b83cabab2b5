"""DeepSeekMoE (arXiv 2401.06066): many narrow experts, and shared ones beside them."""

import pytest
import torch
from narrow_presets import (
    CONFIGS,
    assert_gates_are,
    expert,
    layer_of,
    logs,
    small,
    swiglu,
    training,
    weighted,
    with_few_experts,
)
from torch import Tensor

from dmoe.config import load_config
from dmoe.moe import MoEContext


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eq. 4: plain probabilities, which need not sum to 1."""
    probs, ids_TK = logits_TE.softmax(-1).topk(k)
    return ids_TK, probs


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("deepseek_moe_16b", gates)


def test_shared_experts_always_work() -> None:
    """Eq. 9: what they return is added as it is."""
    layer, x_TD, context = layer_of(small("deepseek_moe_16b"))
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.zero_()
        y_TD, _ = layer(x_TD, context)
        want_TD = layer.shared_experts(x_TD)
    torch.testing.assert_close(y_TD, want_TD)
    assert want_TD.norm() > 0


def test_the_layer_is_the_sum_of_shared_and_chosen_networks() -> None:
    """Eq. 9 without the residual. The shared ones lie in one network, gates first, then ups."""
    layer = with_few_experts("deepseek_moe_16b", 8, "router.top_k=3")
    width, shared = layer.config.expert_width, layer.shared_experts
    gate_up = shared.up_proj.weight.view(2, 2, width, 8)
    down = shared.down_proj.weight.view(8, 2, width)
    x_TD = torch.randn(20, 8, dtype=torch.float64)
    y_TD, _ = layer(x_TD, MoEContext(seq_len=20))
    for x, y in zip(x_TD, y_TD, strict=True):
        want = sum(swiglu(x, gate_up[:, i].flatten(0, 1), down[:, i]) for i in range(2))
        probs, ids = x.softmax(0).topk(3)
        want = want + sum(p * expert(layer, int(i), x) for p, i in zip(probs, ids, strict=True))
        torch.testing.assert_close(y, want)


def test_the_loss_balances_each_sequence_by_hand() -> None:
    """Eq. 12 to 14, over sequences of two tokens with two of four experts.

    In the first f = (2, 2, 0, 0) and P = (0.4, 0.3, 0.2, 0.1): 1.4; in the second all are even: 1.
    """
    layer = with_few_experts("deepseek_moe_16b", 4, "router.top_k=2")
    one, other = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    _, output = layer(logs([one, one, one, other]), training(4, seq_len=2))
    assert weighted(layer, output) == pytest.approx(0.001 * (1.4 + 1) / 2)


def test_the_first_layer_is_dense_and_nothing_is_dropped() -> None:
    model = load_config(CONFIGS / "deepseek_moe_16b.yaml").model
    assert model.moe_layers == list(range(1, 28))
    assert model.moe.capacity is None
