"""DeepSeek-V3 (arXiv 2412.19437): sigmoid gates, a bias on the selection, few nodes a token."""

import pytest
import torch
from narrow_presets import (
    CONFIGS,
    assert_gates_are,
    in_groups,
    training,
    weighted,
    with_few_experts,
)
from torch import Tensor

from dmoe.config import load_config
from dmoe.moe import MoELayer

SCORES = [0.9, 0.65, 0.1, 0.8, 0.7, 0.2, 0.6, 0.55, 0.5, 0.3, 0.2, 0.1]
"""Sigmoids of twelve experts, three a node: the best two of a node sum to 1.55, 1.5, 1.15, 0.5."""


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eq. 12 to 16: sigmoid, 4 of 8 groups by their two best, times 2.5."""
    scores_TE = logits_TE.sigmoid()
    ids_TK = in_groups(scores_TE, 8, 4, 2, k)
    chosen = scores_TE.gather(1, ids_TK)
    return ids_TK, 2.5 * chosen / chosen.sum(-1, keepdim=True)


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("deepseek_v3", gates)


def four_experts_of_two_nodes() -> MoELayer:
    sizes = ("router.top_k=4", "router.groups.num=4", "router.groups.used=2")
    return with_few_experts("deepseek_v3", 12, *sizes)


def logits(num_tokens: int = 1) -> Tensor:
    return torch.tensor([SCORES] * num_tokens, dtype=torch.float64).logit()


def test_gates_by_hand() -> None:
    """Of nodes 0 and 1 the best four are 0.9, 0.8, 0.7 and 0.65, which sum to 3.05."""
    routing = four_experts_of_two_nodes().router(logits(), training(1))
    assert routing.expert_ids_TK.tolist() == [[0, 3, 4, 1]]
    want = [2.5 * score / 3.05 for score in (0.9, 0.8, 0.7, 0.65)]
    assert routing.weights_TK.tolist() == [pytest.approx(want)]


def test_the_bias_chooses_nodes_and_experts_but_does_not_weigh() -> None:
    """With 0.45 more for expert 7, node 2 has 1.0 + 0.6 and takes the place of node 1.

    The best four are then 1.0, 0.9, 0.65 and 0.6, though node 1 has 0.8 and 0.7, and the gate of
    expert 7 goes by its 0.55.
    """
    layer = four_experts_of_two_nodes()
    layer.router.expert_bias_E[7] = 0.45
    routing = layer.router(logits(), training(1))
    assert routing.expert_ids_TK.tolist() == [[7, 0, 1, 6]]
    want = [2.5 * score / 2.7 for score in (0.55, 0.9, 0.65, 0.6)]
    assert routing.weights_TK.tolist() == [pytest.approx(want)]


def test_a_step_moves_the_bias_by_gamma_against_the_load() -> None:
    """Two tokens alike: the four experts that have both are above the mean of 8/12."""
    layer = four_experts_of_two_nodes()
    _, output = layer(logits(2), training(2))
    assert output.stats.counts_E.tolist() == [2, 2, 0, 2, 2] + [0] * 7
    layer.end_step(output.stats.counts_E, 2)
    down, up = pytest.approx(-0.001), pytest.approx(0.001)
    assert layer.router.expert_bias_E.tolist() == [down, down, up, down, down] + [up] * 7


def test_the_loss_of_a_sequence_by_hand() -> None:
    """Eq. 17 to 20, two tokens that chose the same four: f = 12/4 for each of these.

    Scores count as shares of a token's sum: of the first the four have 3.05 of 5.6, of the other
    3.6 of 4.4.
    """
    layer = four_experts_of_two_nodes()
    other = [0.9, 0.9, 0.1, 0.9, 0.9, 0.1] + [0.1] * 6
    x_TD = torch.tensor([SCORES, other], dtype=torch.float64).logit()
    _, output = layer(x_TD, training(2))
    assert output.stats.counts_E.tolist() == [2, 2, 0, 2, 2] + [0] * 7
    assert weighted(layer, output) == pytest.approx(0.0001 * 3 * (3.05 / 5.6 + 3.6 / 4.4) / 2)


def test_the_small_preset_routes_as_the_large_one() -> None:
    small, large = (
        load_config(CONFIGS / f"{name}.yaml").model.moe
        for name in ("deepseek_v3_routing", "deepseek_v3")
    )
    for key in ("router", "losses", "capacity", "num_shared_experts"):
        assert getattr(small, key) == getattr(large, key), key


def test_the_first_three_layers_are_dense_and_nothing_is_dropped() -> None:
    model = load_config(CONFIGS / "deepseek_v3.yaml").model
    assert model.moe_layers == list(range(3, 61))
    assert model.moe.capacity is None
