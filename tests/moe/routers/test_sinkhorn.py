"""Sinkhorn routing: what the scaling converges to, by hand, and who decides when."""

import pytest
import torch

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import SinkhornConfig
from dmoe.moe.routers.sinkhorn import even_columns


def test_rows_and_columns_are_even() -> None:
    """Two groups of six tokens, one of which has two of padding: 3 experts get 2 and 4/3 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = 3 * torch.randn(12, 3, generator=generator, dtype=torch.float64)
    valid_T = torch.arange(12) < 10
    scaled = even_columns(logits_TE, 6, 200, valid_T).exp().view(2, 6, 3)
    ones = torch.ones(2, 6, dtype=torch.float64)
    ones[1, 4:] = 0
    torch.testing.assert_close(scaled.sum(2), ones, atol=1e-6, rtol=0)
    expected = torch.tensor([[2.0] * 3, [4 / 3] * 3], dtype=torch.float64)
    torch.testing.assert_close(scaled.sum(1), expected)


def test_by_hand() -> None:
    """exp(logits) = [[4, 1], [1, 1]] becomes [[2/3, 1/3], [1/3, 2/3]]: ratio 4 = (2/3 / 1/3)^2."""
    logits_TE = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log()
    scaled = even_columns(logits_TE, 2, 50).exp()
    torch.testing.assert_close(scaled, torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))


def test_training_evens_out_and_inference_is_greedy() -> None:
    """All four tokens prefer expert 0; the gate is the plain probability."""
    router = SinkhornConfig(name="sinkhorn").build(dim=2, num_experts=2)
    router.gate.weight.data = torch.eye(2)
    x_TD = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]).log()
    routing = router(x_TD, MoEContext(seq_len=4, totals=BatchTotals(4, 4, 1, 1)))
    assert routing.expert_ids_TK.tolist() == [[0], [0], [1], [1]]
    assert routing.weights_TK.flatten().tolist() == pytest.approx([0.9, 0.8, 0.3, 0.4])
    assert router(x_TD, MoEContext(seq_len=4)).expert_ids_TK.tolist() == [[0]] * 4


def test_more_than_one_expert_a_token() -> None:
    router = SinkhornConfig(name="sinkhorn", top_k=2).build(dim=4, num_experts=3)
    context = MoEContext(seq_len=5, totals=BatchTotals(5, 5, 1, 1))
    assert router(torch.randn(5, 4), context).expert_ids_TK.shape == (5, 2)
