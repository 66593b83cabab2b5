"""ReMoE: gates, penalty and controller, against numbers by hand and a loop."""

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import ReluConfig, ReluRouter

TOTALS = BatchTotals(num_tokens=4, num_targets=4, num_sequences=1, num_micro_batches=1)


def build(weight: list[list[float]], **options: object) -> ReluRouter:
    config = ReluConfig(name="relu", **options)
    router = config.build(dim=len(weight[0]), num_experts=len(weight)).double()
    router.gate.weight.data = torch.tensor(weight).double()
    return router


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values).double()


def test_by_hand() -> None:
    """One token uses experts 2 and 0, one none, one a gate of exactly 0 (unused), one expert 1."""
    router = build([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    x_TD = rows([2, -1], [-1, -1], [0, 0], [-2, 0.5])
    routing = router(x_TD, MoEContext(seq_len=4))
    assert routing.expert_ids_TK.tolist() == [[2, 0], [-1, -1], [-1, -1], [1, -1]]
    assert routing.weights_TK.tolist() == [[7, 2], [0, 0], [0, 0], [0.5, 0]]
    assert routing.counts_E.tolist() == [1, 1, 1]
    assert not routing.losses


def test_the_penalty_by_hand() -> None:
    """Gates 2 and 1 of expert 0, 4 of expert 1; expert 0 has twice the load of expert 1."""
    x_TD = rows([2, -9], [1, 4], [-1, -1], [-1, -1])
    context = MoEContext(seq_len=4, totals=TOTALS)
    weight = [[1.0, 0.0], [0.0, 1.0]]
    plain = build(weight, target_k=1, penalty=0.5, balance=False)(x_TD, context)
    assert plain.losses["relu_penalty"].item() == pytest.approx(0.5 * (2 + 1 + 4) / 4)
    # An even load of one expert per token is 2 tokens an expert; they have 2 and 1.
    even = build(weight, target_k=1, penalty=0.5)(x_TD, MoEContext(seq_len=4, totals=TOTALS))
    assert even.losses["relu_penalty"].item() == pytest.approx(0.5 * (2 + 1 + 4 / 2) / 4)


@pytest.mark.parametrize("balance", [True, False])
def test_the_gradient_is_that_of_the_formula(balance: bool) -> None:
    """Loads are constants; gates pass gradients where they are above 0."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(12, 5, generator=generator).double()
    valid_T = torch.arange(12) % 4 > 0
    weight = torch.randn(6, 5, generator=generator).double()
    router = build(weight.tolist(), target_k=2, penalty=0.3, balance=balance)
    context = MoEContext(seq_len=12, valid_T=valid_T, totals=BatchTotals(30, 30, 3, 3))
    routing = router(x_TD, context)
    (routing.weights_TK.square().sum() + routing.losses["relu_penalty"]).backward()

    w = weight.clone().requires_grad_()
    total = torch.zeros(()).double()
    gates = [
        [max(0.0, (w[e] @ x).item()) if v else 0.0 for e in range(6)]
        for x, v in zip(x_TD, valid_T, strict=True)
    ]
    for t in range(12):
        for e in range(6):
            if gates[t][e] > 0:
                gate = w[e] @ x_TD[t]
                load = sum(row[e] > 0 for row in gates) / (9 * 2 / 6) if balance else 1.0
                total = total + gate.square() + 0.3 * load * gate / 30
    total.backward()
    torch.testing.assert_close(router.gate.weight.grad, w.grad)


def test_the_controller_by_hand() -> None:
    """Too many experts raise the penalty, too few lower it, and the target leaves it."""
    router = build([[1.0]] * 4, target_k=2, penalty=1e-3, penalty_factor=1.5)
    for counts, exponent in (([9, 9, 9, 9], 1), ([8, 8, 8, 8], 2), ([2, 2, 2, 2], 1), ([5] * 4, 1)):
        router.end_step(torch.tensor(counts), 10)
        assert router.exponent.item() == exponent
    assert router.weight().item() == pytest.approx(1.5e-3)


@pytest.mark.parametrize("k", [1, 2, torch.tensor([2, 0, 1, 3])])
def test_a_number_of_experts_bounds_those_that_are_used(k: int | Tensor) -> None:
    router = build([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    x_TD = rows([2, 1], [1, 1], [5, 4], [-2, 0.5])
    routing = router(x_TD, MoEContext(seq_len=4, k_L=(k,)))
    for token, limit in enumerate(torch.as_tensor(k).expand(4).tolist()):
        best = [2, 0, 1][: min(3, limit)] if token < 3 else [1][:limit]
        assert [e for e in routing.expert_ids_TK[token].tolist() if e >= 0] == best


def test_a_threshold_where_no_token_has_an_expert() -> None:
    router = build([[-1.0, -1.0], [-2.0, -1.0]])
    routing = router(rows([1, 1], [2, 1]), MoEContext(seq_len=2, gate_threshold=0.5))
    assert not routing.counts_E.any()
