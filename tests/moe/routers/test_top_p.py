"""The top-p router against a loop in plain Python, and its controller."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.moe.routers import TopPConfig, TopPRouter

TOKENS, DIM, EXPERTS = 12, 4, 6


def build(num_experts: int = EXPERTS, dim: int = DIM, **options: Any) -> TopPRouter:
    router = TopPConfig(name="top_p", **options).build(dim=dim, num_experts=num_experts).double()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-1, 2, (num_experts, dim), generator=generator)
    router.gate.weight.data.copy_(weight)
    return router


def small_integers() -> Tensor:
    """Tokens of small integers: many logits are equal, so that ties are exercised."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-1, 2, (TOKENS, DIM), generator=generator).double()


def route_loop(
    x: Tensor, router: TopPRouter, p: float, valid: list[bool]
) -> tuple[list[list[int]], list[list[float]]]:
    """Define the router, a token at a time: (ids, gates) of the experts that each token has."""
    config = router.config
    ids, gates = [], []
    for token, is_valid in zip(x.tolist(), valid, strict=True):
        rows = router.gate.weight.tolist()
        logits = [sum(a * b for a, b in zip(row, token, strict=True)) for row in rows]
        scores = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
        chosen: list[int] = []
        for expert in sorted(range(EXPERTS), key=lambda e: (-scores[e], e)):
            if not is_valid or len(chosen) == (config.max_k or EXPERTS):
                break
            if chosen and sum(scores[e] for e in chosen) >= p:
                break
            chosen.append(expert)
        weights = [scores[e] for e in chosen]
        if config.normalize:
            weights = [weight / sum(weights) for weight in weights]
        ids.append(chosen)
        gates.append(weights)
    return ids, gates


# Sums of the scores of small integers that come close to these differ by far more than rounding.
@pytest.mark.parametrize("p", [0.01, 0.301, 0.503, 0.807, 0.98, 1.0])
@pytest.mark.parametrize("max_k", [None, 1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_loop(p: float, max_k: int | None, normalize: bool) -> None:
    for padded, shift in itertools.product([False, True], [0.0, -0.2]):
        router = build(p=p, max_k=max_k, normalize=normalize)
        router.p_shift.fill_(shift)
        valid = [not padded or token % 3 > 0 for token in range(TOKENS)]
        context = MoEContext(seq_len=TOKENS, valid_T=torch.tensor(valid) if padded else None)
        routing = router(small_integers(), context)
        ids, gates = route_loop(small_integers(), router, p + shift, valid)
        width = routing.expert_ids_TK.shape[1]
        assert width <= (max_k or EXPERTS)
        assert routing.expert_ids_TK.tolist() == [row + [-1] * (width - len(row)) for row in ids]
        expected = torch.tensor([row + [0.0] * (width - len(row)) for row in gates])
        torch.testing.assert_close(routing.weights_TK.float(), expected)
        chosen = [expert for row in ids for expert in row]
        assert routing.counts_E.tolist() == [chosen.count(e) for e in range(EXPERTS)]


@pytest.mark.parametrize(("p", "expected"), [(0.6, [2]), (0.7, [2, 1]), (0.9, [2, 1, 0])])
def test_by_hand(p: float, expected: list[int]) -> None:
    """Logits log 1, log 2, log 5 make scores 1/8, 2/8, 5/8."""
    router = build(num_experts=3, dim=1, p=p)
    router.gate.weight.data = torch.tensor([[1.0], [2.0], [5.0]]).double().log()
    routing = router(torch.ones(1, 1).double(), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [expected]
    sizes = [[1, 2, 5][expert] for expert in expected]
    gates = [size / sum(sizes) for size in sizes]
    assert routing.weights_TK.tolist() == [pytest.approx(gates)]


@pytest.mark.parametrize("k", [1, 4, torch.arange(TOKENS) % 5 + 1])
def test_a_forced_k_is_the_plain_top_k(k: int | Tensor) -> None:
    routing = build(p=0.3)(small_integers(), MoEContext(seq_len=TOKENS, k_L=(k,)))
    scores_TE = routing.scores_TE
    for token, num in enumerate(torch.as_tensor(k).expand(TOKENS).tolist()):
        ids = [e for e in routing.expert_ids_TK[token].tolist() if e >= 0]
        assert ids == scores_TE[token].sort(descending=True, stable=True).indices[:num].tolist()


def test_no_tokens() -> None:
    routing = build()(torch.zeros(0, DIM).double(), MoEContext(seq_len=1))
    assert routing.counts_E.tolist() == [0] * EXPERTS


def test_the_controller_by_hand() -> None:
    """Errors of a half and a quarter of the target; each gain does what its name says."""
    gains = {"target_k": 2, "proportional": 0.6, "integral": 0.3}
    router = build(p=0.5, controller=gains)

    def after(mean_k: float) -> float:
        router.end_step(torch.tensor([round(mean_k * 100), 0, 0, 0, 0, 0]), 100)
        return router.p_shift.item()

    first = 0.6 * 0.5 + 0.3 * 0.5
    assert after(1.0) == pytest.approx(first)
    second = first + 0.6 * (0.25 - 0.5) + 0.3 * 0.25
    assert after(1.5) == pytest.approx(second)
    router.end_step(torch.zeros(6, dtype=torch.int64), 1)
    assert router.p_shift.item() == pytest.approx(second), "a step of padding tells nothing"
    assert router.last_error.item() == pytest.approx(0.25)
    for _ in range(100):
        after(1.0)
    assert 0.5 + router.p_shift.item() == pytest.approx(1.0), "p is no more than 1"
    for _ in range(100):
        after(6.0)
    assert 0.5 + router.p_shift.item() == pytest.approx(1 / 6), "nor less than one expert takes"
    after(1.0)
    assert 0.5 + router.p_shift.item() > 1 / 6 + 0.1, "what was cut off is not owed"


def test_without_a_controller_p_stays() -> None:
    router = build(p=0.5)
    router.end_step(torch.ones(6, dtype=torch.int64), 1)
    assert not any(buffer.any() for buffer in router.buffers())


@pytest.mark.parametrize("target", [1.5, 3.0, 5.0])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_the_controller_reaches_its_target_and_stays_there(target: float, p: float) -> None:
    """Although the router grows surer of its choice all the while."""
    router = build(num_experts=8, dim=8, p=p, controller={"target_k": target})
    generator = torch.Generator().manual_seed(0)
    router.gate.weight.data = torch.randn(8, 8, generator=generator).double()
    means = []
    for step in range(300):
        x_TD = (0.3 + step / 600) * torch.randn(200, 8, generator=generator).double()
        counts_E = router(x_TD, MoEContext(seq_len=200)).counts_E
        router.end_step(counts_E, 200)
        means.append(counts_E.sum().item() / 200)
    assert abs(means[0] - target) > 0.4
    assert sum(means[-50:]) / 50 == pytest.approx(target, rel=0.05)
    assert max(abs(mean - target) for mean in means[-50:]) < 0.5


def test_capacity_is_a_share_of_the_slots_that_tokens_ask_for() -> None:
    """4 tokens ask for 1 + 2 + 2 + 3 = 8 slots of 4 experts: 2 an expert at a factor of 1."""
    moe = {"num_experts": 4, "expert_ffn_dim": 8, "router": {"name": "top_p", "p": 0.7}}
    layer = MoELayer(MoEConfig(**moe, capacity={"factor": 1, "minimum": 0}), dim=4).double()
    layer.router.gate.weight.data = torch.eye(4).double()
    scores_TE = torch.tensor(
        [[0.85, 0.05, 0.05, 0.05], [0.5, 0.3, 0.1, 0.1], [0.5, 0.1, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1]]
    ).double()
    totals = BatchTotals(4, 4, 1, 1)
    _, output = layer(scores_TE.log(), MoEContext(seq_len=4, totals=totals))
    assert output.stats.counts_E.tolist() == [4, 2, 2, 0]
    assert output.stats.dropped == 2
    [loss] = output.losses.values()
    means = scores_TE.mean(0).tolist()
    assert loss.item() == pytest.approx(4 * (means[0] / 2 + means[1] / 4 + means[2] / 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "greater than 0"),
        ({"p": 1.1}, "less than or equal to 1"),
        ({"max_k": 9}, r"router\.max_k = 9 is more than num_experts = 8"),
        ({"controller": {"target_k": 0.5}}, "greater than or equal to 1"),
        ({"controller": {"target_k": 9}}, r"target_k = 9.* is more than num_experts = 8"),
        ({"max_k": 2, "controller": {"target_k": 3}}, r"target_k = 3 is more than max_k = 2"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(num_experts=8, expert_ffn_dim=8, router={"name": "top_p", **options})


def test_how_many_experts_it_is_counted_with() -> None:
    config = TopPConfig(name="top_p")
    assert (config.fixed_k, config.nominal_k(8), config.most_k(8)) == (None, 8, 8)
    config = TopPConfig(name="top_p", max_k=4, controller={"target_k": 2.5})
    assert (config.nominal_k(8), config.most_k(8)) == (2.5, 4)


def test_the_entropy_is_a_loss_by_hand() -> None:
    """Probabilities 3/4 and 1/4; padding does not count."""
    router = build(2, 1, entropy_weight=0.1)
    router.gate.weight.data = torch.tensor([[3.0], [1.0]]).double().log()
    valid_T, totals = torch.tensor([True, False, True]), BatchTotals(2, 2, 1, 1)
    routing = router(torch.ones(3, 1).double(), MoEContext(3, valid_T=valid_T, totals=totals))
    expected = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert routing.losses["entropy"].item() == pytest.approx(expected)
    assert router.config.loss_weights() == {"entropy": 0.1}
    assert build(2, 1)(torch.ones(3, 1).double(), MoEContext(3, totals=totals)).losses == {}
