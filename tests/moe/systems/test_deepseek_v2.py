"""DeepSeek-V2 (arXiv 2405.04434): experts of few devices, those with the best single expert."""

import pytest
import torch
from narrow_presets import (
    CONFIGS,
    assert_gates_are,
    in_groups,
    logs,
    training,
    weighted,
    with_few_experts,
)
from torch import Tensor

from dmoe.config import load_config
from dmoe.moe import MoELayer

FOUR_DEVICES = [0.30, 0.02, 0.22, 0.03, 0.20, 0.12, 0.06, 0.05]
"""Probabilities of eight experts, two a device."""


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Section 2.2.2: three of eight devices by their best expert, times 16."""
    probs_TE = logits_TE.softmax(-1)
    ids_TK = in_groups(probs_TE, 8, 3, 1, k)
    return ids_TK, 16 * probs_TE.gather(1, ids_TK)


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("deepseek_v2", gates)


def three_experts_of_two_devices() -> MoELayer:
    sizes = ("router.top_k=3", "router.groups.num=4", "router.groups.used=2")
    return with_few_experts("deepseek_v2", 8, *sizes)


def test_the_best_experts_of_the_best_devices_by_hand() -> None:
    """Devices 0 and 1 have the best experts, 0.30 and 0.22, so expert 4 with its 0.20 is not taken.

    By its two best, which sum to 0.32 as do those of device 0, device 2 would be.
    """
    layer = three_experts_of_two_devices()
    routing = layer.router(logs([FOUR_DEVICES]), training(1))
    assert routing.expert_ids_TK.tolist() == [[0, 2, 3]]
    assert routing.weights_TK.tolist() == [pytest.approx([16 * 0.30, 16 * 0.22, 16 * 0.03])]


def test_the_loss_counts_what_was_chosen_within_the_devices_by_hand() -> None:
    """Section 2.2.3, two such tokens: f = 8/3 for the three chosen, and 8/3 x 0.55 the loss."""
    layer = three_experts_of_two_devices()
    _, output = layer(logs([FOUR_DEVICES] * 2), training(2))
    assert weighted(layer, output) == pytest.approx(0.003 * 8 / 3 * (0.30 + 0.22 + 0.03))


def test_two_shared_experts_see_all_tokens() -> None:
    layer = three_experts_of_two_devices()
    x_TD = logs([FOUR_DEVICES])
    with torch.no_grad():
        layer.experts.w_down_EDF.zero_()
        y_TD, _ = layer(x_TD, training(1))
        torch.testing.assert_close(y_TD, layer.shared_experts(x_TD))
    assert layer.shared_experts.down_proj.weight.shape == (8, 2 * layer.config.expert_width)
    assert y_TD.norm() > 0


def test_the_first_layer_is_dense() -> None:
    assert load_config(CONFIGS / "deepseek_v2.yaml").model.moe_layers == list(range(1, 60))
