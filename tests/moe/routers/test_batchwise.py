"""Strict balance in training, thresholds at inference, and the loss that makes them agree."""

import pytest
import torch

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import BatchwiseConfig, BatchwiseRouter
from dmoe.moe.routers.batchwise import threshold_loss

SCORES_TE = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.8, 0.2]])


def build() -> BatchwiseRouter:
    router = BatchwiseConfig(name="batchwise", top_k=1).build(dim=2, num_experts=2)
    router.gate.weight.data = torch.eye(2)
    return router


def training() -> MoEContext:
    return MoEContext(seq_len=4, totals=BatchTotals(4, 4, 1, 1))


def test_training_by_hand() -> None:
    """Four tokens, two experts, k = 1: each takes its best two, and gates are divided by their
    sum, so token 0, which only expert 1 takes, has a gate of 1."""
    routing = build()(SCORES_TE.log(), training())
    assert routing.expert_ids_TK.tolist() == [[1], [0], [1], [0]]
    assert routing.weights_TK.tolist() == [[1.0]] * 4
    assert routing.counts_E.tolist() == [2, 2]


def test_a_token_may_have_several_experts_or_none() -> None:
    router = BatchwiseConfig(name="batchwise", top_k=1).build(dim=3, num_experts=3)
    router.gate.weight.data = torch.eye(3)
    scores_TE = torch.tensor([[0.34, 0.33, 0.33], [0.5, 0.25, 0.25], [0.2, 0.4, 0.4]])
    totals = BatchTotals(3, 3, 1, 1)
    routing = router(scores_TE.log(), MoEContext(seq_len=3, totals=totals))
    assert routing.expert_ids_TK.tolist() == [[-1, -1], [0, -1], [1, 2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0, 0], [1, 0], [0.5, 0.5]]))


def test_inference_goes_by_the_thresholds() -> None:
    router = build()
    router.gate.threshold.value_E.data = torch.tensor([0.55, 0.35])
    routing = router(SCORES_TE.log(), MoEContext(seq_len=4))
    assert routing.expert_ids_TK.tolist() == [[0, 1], [0, -1], [1, -1], [0, -1]]
    assert routing.weights_TK[0].tolist() == pytest.approx([0.6, 0.4])
    assert routing.losses == {}


def test_threshold_loss_by_hand() -> None:
    """Expert 0 took tokens 1 and 3. A threshold of 0.5 also takes token 0: (0.6 - 0.5) / 4.

    Expert 1 took tokens 0 and 2. A threshold of 0.5 misses token 0: (0.5 - 0.4) / 4.
    """
    threshold_E = torch.tensor([0.5, 0.5], requires_grad=True)
    chosen_TE = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]]).bool()
    totals = BatchTotals(4, 4, 1, 1)
    loss = threshold_loss(SCORES_TE, threshold_E, chosen_TE, totals, None)
    assert loss.item() == pytest.approx((0.1 + 0.1) / 4)
    loss.backward()
    assert threshold_E.grad.tolist() == [-0.25, 0.25], "descent raises the first, lowers the second"
    agreeing = torch.tensor([0.7, 0.3])
    assert threshold_loss(SCORES_TE, agreeing, chosen_TE, totals, None).item() == 0


def test_thresholds_learn_and_the_scores_do_not_see_their_loss() -> None:
    router = build()
    routing = router(SCORES_TE.log(), training())
    routing.losses["threshold"].backward()
    assert router.gate.weight.grad is None or not router.gate.weight.grad.any()
    optimizer = torch.optim.SGD([router.gate.threshold.value_E], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        router(SCORES_TE.log(), training()).losses["threshold"].backward()
        optimizer.step()
    learned = router(SCORES_TE.log(), MoEContext(seq_len=4))
    assert learned.expert_ids_TK.tolist() == [[1], [0], [1], [0]]
