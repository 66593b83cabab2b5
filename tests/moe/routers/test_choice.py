"""Choosing and weighing experts: stochastic co-activation, and gates divided by their sum."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import TopKConfig
from dmoe.moe.routers.choice import divided_by_sum, top_k_routing

EXPERTS, POOL, TOKENS = 6, 4, 3000
KS = torch.arange(1, POOL + 1)
TOTALS = BatchTotals(num_tokens=1, num_targets=1, num_sequences=1, num_micro_batches=1)


def route(ids_T: Tensor, k: int | Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Route equal tokens, of which the experts 0, 1, ... are the best, in this order."""
    router = TopKConfig().build(dim=1, num_experts=EXPERTS).double()
    router.gate.weight.data = -torch.arange(float(EXPERTS)).double()[:, None]
    training = {"totals": TOTALS, "token_ids_T": ids_T, "k_ideal": POOL, "k_L": (k, k)}
    context = MoEContext(seq_len=len(ids_T), **{**training, **options})
    routing = router(torch.ones(len(ids_T), 1).double(), context)
    return routing.expert_ids_TK, routing.weights_TK


@pytest.mark.parametrize("k", KS.tolist())
@pytest.mark.parametrize("mixed", [False, True], ids=["one k", "a k for each token"])
def test_each_subset_of_the_best_is_drawn_equally_often(k: int, mixed: bool) -> None:
    """The slow twin is the list of all subsets, each in the order of score."""
    if mixed:
        ids_TK, weights_TK = route(torch.arange(TOKENS * POOL), KS.repeat(TOKENS))
        ids_TK, weights_TK = ids_TK[k - 1 :: POOL], weights_TK[k - 1 :: POOL]
        assert (ids_TK[:, k:] == -1).all()
        assert not weights_TK[:, k:].any()
        ids_TK, weights_TK = ids_TK[:, :k], weights_TK[:, :k]
    else:
        ids_TK, weights_TK = route(torch.arange(TOKENS), k)
    seen = list(map(tuple, ids_TK.tolist()))
    subsets = list(itertools.combinations(range(POOL), k))
    assert set(seen) == set(subsets)
    p = 1 / len(subsets)
    for subset in subsets:
        deviation = math.sqrt(p * (1 - p) / TOKENS)
        assert seen.count(subset) / TOKENS == pytest.approx(p, abs=4 * deviation)
    for expert in range(POOL):
        share = (ids_TK == expert).any(1).double().mean().item()
        assert share == pytest.approx(k / POOL, abs=0.04)
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(TOKENS).double())


def test_the_subset_follows_the_token() -> None:
    ids_T = torch.arange(50)
    whole, _ = route(ids_T, 2)
    assert torch.equal(route(ids_T[30:], 2)[0], whole[30:])
    assert torch.equal(route(ids_T, 2, micro_batch=1)[0], whole)
    for changes in ({"seed": 1}, {"step": 1}, {"layer": 1}):
        assert not torch.equal(route(ids_T, 2, **changes)[0], whole)


def test_without_a_pool_the_best_are_taken() -> None:
    ids_TK, _ = route(torch.arange(20), 2, k_ideal=None)
    assert ids_TK.tolist() == [[0, 1]] * 20


def test_padding_draws_nothing() -> None:
    valid_T = torch.arange(20) < 10
    ids_TK, weights_TK = route(torch.arange(20), 2, valid_T=valid_T)
    assert (ids_TK[:10] >= 0).all()
    assert (ids_TK[10:] == -1).all()
    assert not weights_TK[10:].any()


@pytest.mark.parametrize("k", [None, 1, torch.tensor([3, 0, 1, 2])])
def test_plain_routing_is_that_of_the_router(k: int | Tensor | None) -> None:
    """Two experts a token, or as many as the context says; ties, and padding."""
    router = TopKConfig(top_k=2, normalize=False).build(dim=2, num_experts=3).double()
    x_TD = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 3.0], [2.0, 1.0]]).double()
    context = {"seq_len": 4, "valid_T": torch.arange(4) != 3, "k_L": None if k is None else (k,)}
    expected = router(x_TD, MoEContext(**context))
    parts = (expected.logits_TE, expected.scores_TE, 2)
    routing = top_k_routing(*parts, MoEContext(**context))
    for name in ("expert_ids_TK", "weights_TK", "counts_E"):
        assert torch.equal(getattr(routing, name), getattr(expected, name)), name


def test_division_by_the_sum_has_the_gradient_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    dy = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    plain = scores / scores.sum(-1, keepdim=True)
    assert torch.equal(divided_by_sum(scores), plain)
    ours, theirs = (torch.autograd.grad(y, scores, dy)[0] for y in (divided_by_sum(scores), plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_one_score_has_exactly_no_gradient(dtype: torch.dtype) -> None:
    """Autograd's own rules leave a rounding error for some of these."""
    scores = torch.rand(1000, 1, dtype=dtype).requires_grad_()
    dy = torch.randn(1000, 1, dtype=dtype)
    [gradient] = torch.autograd.grad(divided_by_sum(scores), scores, dy)
    assert not gradient.any()
