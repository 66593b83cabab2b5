"""SparseMixer against a loop, its draws, and its gradient by hand."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import SparseMixerConfig, SparseMixerRouter
from dmoe.rng import stream_key, token_uniform

TOKENS, DIM, EXPERTS = 60, 5, 6
CONTEXT = MoEContext(
    seq_len=TOKENS,
    token_ids_T=torch.arange(7, 7 + TOKENS),
    totals=BatchTotals(TOKENS, TOKENS, 1, 1),
    seed=3,
    step=4,
    layer=1,
)


def build(dim: int = DIM, num_experts: int = EXPERTS, **options: object) -> SparseMixerRouter:
    config = SparseMixerConfig(name="sparse_mixer", **options)
    router = config.build(dim=dim, num_experts=num_experts).double()
    router.gate.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return router


def fresh(**changes: object) -> MoEContext:
    return dataclasses.replace(CONTEXT, replay=type(CONTEXT.replay)(), **changes)


def tokens() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2)).double()


def route_loop(
    logits: list[float], token_id: int, k: int, jitter: float, training: bool
) -> tuple[list[int], list[float]]:
    """Define the router for one token: experts and forward gates."""
    left, ids, gates = set(range(EXPERTS)), [], []
    for slot in range(k):
        best = min(left, key=lambda e: (-logits[e], e))
        top = logits[best]
        close = [
            e for e in left if e == best or top - logits[e] <= 2 * jitter * max(abs(logits[e]), top)
        ]
        total = sum(math.exp(logits[e] - top) for e in close)
        chosen, factor = best, 1.0
        if training:
            key = stream_key(3, "sparse_mixer", 4, 1, slot)
            uniform = token_uniform(key, torch.tensor([token_id]), EXPERTS + 1)[0].tolist()
            chosen = max(
                close, key=lambda e: logits[e] - math.log(-math.log(max(uniform[e], 2**-25)))
            )
            factor = 1.0 if chosen == best or uniform[EXPERTS] < 0.25 else 1 / 3
        ids.append(chosen)
        gates.append(factor * math.exp(logits[chosen] - top) / total)
        left.remove(chosen)
    return ids, gates


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_equals_the_loop(jitter: float, training: bool, k: int) -> None:
    router, x_TD = build(top_k=k, jitter=jitter), tokens()
    routing = router(x_TD, fresh(totals=CONTEXT.totals if training else None))
    for t, logits in enumerate(router.gate(x_TD).tolist()):
        ids, gates = route_loop(logits, 7 + t, k, jitter, training)
        assert routing.expert_ids_TK[t].tolist() == ids
        assert routing.weights_TK[t].tolist() == pytest.approx(gates)


def test_each_token_with_a_number_of_its_own() -> None:
    router, x_TD, k_T = build(jitter=0.3), tokens(), torch.arange(TOKENS) % 4
    routing = router(x_TD, fresh(k_L=(None, k_T)))
    for t, logits in enumerate(router.gate(x_TD).tolist()):
        ids, _ = route_loop(logits, 7 + t, int(k_T[t]), 0.3, True)
        assert [e for e in routing.expert_ids_TK[t].tolist() if e >= 0] == ids


def test_experts_are_drawn_by_their_softmax() -> None:
    """Logits log 4, log 3, log 1, all close: drawn in 1/2, 3/8 and 1/8 of cases."""
    router = build(dim=1, num_experts=3, top_k=1, jitter=9.0)
    router.gate.weight.data = torch.tensor([[4.0], [3.0], [1.0]]).double().log()
    num = 40_000
    context = fresh(token_ids_T=torch.arange(num))
    routing = router(torch.ones(num, 1).double(), context)
    share = routing.counts_E / num
    assert share.tolist() == pytest.approx([1 / 2, 3 / 8, 1 / 8], abs=0.01)
    # Draws that are not the best count whole in a quarter of the cases.
    gates = routing.weights_TK[routing.expert_ids_TK == 1]
    assert gates.unique().tolist() == pytest.approx([1 / 8, 3 / 8])
    assert (gates > 0.2).double().mean().item() == pytest.approx(0.25, abs=0.01)
    best = routing.weights_TK[routing.expert_ids_TK == 0]
    assert best.tolist() == pytest.approx([1 / 2] * len(best))


def test_the_gradient_is_that_of_the_whole_gate() -> None:
    """Whatever the factor: p_i (1 at i - p), over the experts that i was drawn from."""
    router, x_TD = build(jitter=0.5), tokens()
    context = fresh()
    routing = router(x_TD, context)
    draw = router.select(router.gate(x_TD).detach(), fresh())
    assert (draw.factors_TK < 1).any()
    assert not draw.close_TKE.all()
    upstream = torch.randn(TOKENS, 2, generator=torch.Generator().manual_seed(5)).double()
    (routing.weights_TK * upstream).sum().backward()
    expected = torch.zeros(TOKENS, EXPERTS).double()
    logits_TE = router.gate(x_TD).detach()
    for t in range(TOKENS):
        for slot in range(2):
            close = draw.close_TKE[t, slot]
            p = logits_TE[t].masked_fill(~close, -math.inf).softmax(0)
            i = int(draw.ids_TK[t, slot])
            onehot = torch.eye(EXPERTS).double()[i]
            expected[t] += upstream[t, slot] * p[i] * (onehot - p)
    torch.testing.assert_close(router.gate.weight.grad, expected.T @ x_TD)


def test_inference_takes_the_best() -> None:
    router, x_TD = build(), tokens()
    routing = router(x_TD, fresh(totals=None, token_ids_T=None))
    assert torch.equal(routing.expert_ids_TK, router.gate(x_TD).topk(2).indices)
