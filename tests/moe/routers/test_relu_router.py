"""ReMoE: gates, penalty and controller, against numbers by hand and a loop."""

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
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


def mean_k_of_last_steps(target_k: int, penalty: float, penalty_factor: float) -> float:
    """Train eight experts to learn a linear map, and return the experts a token had in the end.

    The first number of a token is 1: without a constant direction, half of all logits are above 0.
    """
    generator = torch.Generator().manual_seed(0)
    section = {"name": "relu", "target_k": target_k, "penalty": penalty}
    section["penalty_factor"] = penalty_factor
    layer = MoELayer(MoEConfig(num_experts=8, expert_ffn_dim=8, router=section), dim=8)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    map_DD = torch.randn(8, 8, generator=generator) / 8**0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    totals = BatchTotals(num_tokens=256, num_targets=256, num_sequences=1, num_micro_batches=1)
    ks = []
    for _ in range(400):
        x_TD = torch.randn(256, 8, generator=generator)
        x_TD[:, 0] = 1
        y_TD, output = layer(x_TD, MoEContext(seq_len=256, totals=totals))
        loss = (y_TD - x_TD @ map_DD).square().mean()
        optimizer.zero_grad()
        (loss + output.losses["relu_penalty"]).backward()
        optimizer.step()
        layer.end_step(output.stats.counts_E, 256)
        ks.append(output.stats.counts_E.sum().item() / 256)
    return sum(ks[-100:]) / 100


@pytest.mark.parametrize("target_k", [1, 2])
def test_the_penalty_reaches_its_target(target_k: int) -> None:
    mean_k = mean_k_of_last_steps(target_k, penalty=1e-3, penalty_factor=1.05)
    assert mean_k == pytest.approx(target_k, rel=0.05)


def test_without_a_penalty_the_target_is_not_reached() -> None:
    assert mean_k_of_last_steps(2, penalty=1e-9, penalty_factor=1 + 1e-6) > 3
