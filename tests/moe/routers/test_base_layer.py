"""The balanced assignment against all assignments there are, and the router that uses it."""

import itertools

import pytest
import torch

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import BaseLayerConfig
from dmoe.moe.routers.base_layer import balanced_assignment


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(6, 3), (5, 2), (4, 4), (2, 3), (7, 3)])
def test_no_balanced_assignment_scores_higher(num_tokens, num_experts) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    scores_TE = torch.randn(num_tokens, num_experts, generator=generator)
    most = -(-num_tokens // num_experts)
    best = max(
        sum(scores_TE[t, e].item() for t, e in enumerate(experts))
        for experts in itertools.product(range(num_experts), repeat=num_tokens)
        if max(map(experts.count, range(num_experts))) <= most
    )
    ids_T = balanced_assignment(scores_TE)
    assert torch.bincount(ids_T, minlength=num_experts).max() <= most
    assert scores_TE.gather(1, ids_T[:, None]).sum().item() == pytest.approx(best)


def test_by_hand() -> None:
    """All want expert 0; token 1 loses least by going to expert 1."""
    scores_TE = torch.tensor([[5.0, 1.0], [4.0, 3.0]])
    assert balanced_assignment(scores_TE).tolist() == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_count_as_zero(bad: float) -> None:
    """The gate stays as it is, so that the loss tells and the step is skipped."""
    assert balanced_assignment(torch.tensor([[bad, 1.0], [0.0, 3.0]])).tolist() == [0, 1]
    router = BaseLayerConfig(name="base_layer").build(dim=2, num_experts=2)
    x_TD = torch.tensor([[2.0, 1.0], [float("nan"), 0.0]])
    routing = router(x_TD, MoEContext(seq_len=2, totals=BatchTotals(2, 2, 1, 1)))
    assert routing.counts_E.tolist() == [1, 1]
    assert routing.weights_TK.isnan().flatten().tolist() == [False, True]


def test_equal_scores_and_no_tokens() -> None:
    assert balanced_assignment(torch.zeros(4, 2)).tolist() == [0, 0, 1, 1]
    assert balanced_assignment(torch.zeros(0, 2)).tolist() == []


def test_training_assigns_within_groups_and_inference_is_greedy() -> None:
    """Two sequences of two tokens; all want expert 0, whose gate is sigmoid(2)."""
    router = BaseLayerConfig(name="base_layer").build(dim=2, num_experts=2)
    router.gate.weight.data = torch.eye(2)
    x_TD = torch.tensor([[2.0, 1.0], [2.0, 0.0], [2.0, -1.0], [2.0, 1.5]])
    training = MoEContext(seq_len=2, totals=BatchTotals(4, 4, 2, 1))
    routing = router(x_TD, training)
    assert routing.expert_ids_TK.tolist() == [[1], [0], [0], [1]]
    expected = torch.tensor([[1.0], [2.0], [2.0], [1.5]]).sigmoid()
    torch.testing.assert_close(routing.weights_TK, expected)
    assert routing.counts_E.tolist() == [2, 2]
    greedy = router(x_TD, MoEContext(seq_len=2))
    assert greedy.expert_ids_TK.tolist() == [[0]] * 4


def test_padding_takes_no_place() -> None:
    router = BaseLayerConfig(name="base_layer").build(dim=2, num_experts=2)
    router.gate.weight.data = torch.eye(2)
    valid_T = torch.tensor([True, False, True, False])
    context = MoEContext(seq_len=4, valid_T=valid_T, totals=BatchTotals(2, 2, 1, 1))
    routing = router(torch.tensor([[3.0, 0.0]] * 4), context)
    assert sorted(routing.expert_ids_TK.flatten().tolist()) == [-1, -1, 0, 1]
