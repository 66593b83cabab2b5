"""The top-k router against a loop in plain Python, and what its options promise."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import TopKConfig, TopKRouter
from dmoe.rng import stream_key, token_uniform

TOKENS, DIM, EXPERTS = 5, 4, 6
TOTALS = BatchTotals(num_tokens=TOKENS, num_targets=TOKENS, num_sequences=1, num_micro_batches=1)


def build(dtype: torch.dtype = torch.float64, **options) -> TopKRouter:
    router = TopKConfig(**options).build(dim=DIM, num_experts=EXPERTS).to(dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-1, 2, (EXPERTS, DIM), generator=generator)
    router.gate.weight.data.copy_(weight)
    return router


def small_integers() -> Tensor:
    """Tokens and weights of small integers: many logits are equal, so that ties are exercised."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-1, 2, (TOKENS, DIM), generator=generator).double()


def route_loop(
    x: Tensor, router: TopKRouter, *, noise: Tensor, valid: list[bool]
) -> tuple[list[list[int]], list[list[float]]]:
    """Define the router, a token at a time."""
    config = router.config
    ids, gates = [], []
    for token, factors, is_valid in zip(x.tolist(), noise.tolist(), valid, strict=True):
        token = [value * factor for value, factor in zip(token, factors, strict=True)]
        rows = router.gate.weight.tolist()
        logits = [sum(a * b for a, b in zip(row, token, strict=True)) for row in rows]
        if config.score == "softmax":
            scores = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in logits]
        bias = router.expert_bias_E.tolist()
        chosen = sorted(range(EXPERTS), key=lambda e: (-(scores[e] + bias[e]), e))[: config.top_k]
        weights = [scores[e] for e in chosen]
        if config.order == "select_then_score" and config.score == "softmax":
            weights = [
                math.exp(logits[e]) / sum(math.exp(logits[i]) for i in chosen) for e in chosen
            ]
        if config.normalize:
            weights = [w / sum(weights) for w in weights]
        ids.append(chosen if is_valid else [-1] * config.top_k)
        gates.append([w * config.scaling_factor if is_valid else 0.0 for w in weights])
    return ids, gates


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["score_then_select", "select_then_score"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
def test_equals_the_loop(score, order, normalize, top_k) -> None:
    for scaling, biased, jitter, padded in itertools.product(
        [1.0, 2.5], [False, True], [0.0, 0.1], [False, True]
    ):
        router = build(
            score=score,
            order=order,
            normalize=normalize,
            top_k=top_k,
            scaling_factor=scaling,
            jitter=jitter,
            bias_update_rate=0.001 * biased,
        )
        if biased:
            router.expert_bias_E.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0, 0.6]))
        valid = [True, not padded, True, not padded, True]
        context = MoEContext(
            seq_len=TOKENS,
            valid_T=torch.tensor(valid) if padded else None,
            token_ids_T=torch.arange(100, 100 + TOKENS),
            totals=TOTALS,
            seed=3,
            step=4,
            layer=1,
        )
        uniform = token_uniform(stream_key(3, "router_jitter", 4, 1), context.token_ids_T, DIM)
        noise = 1 + jitter * (2 * uniform - 1)

        x = small_integers()
        routing = router(x, context)
        ids, gates = route_loop(x, router, noise=noise, valid=valid)
        assert routing.expert_ids_TK.tolist() == ids
        torch.testing.assert_close(
            routing.weights_TK, torch.tensor(gates, dtype=torch.float64), rtol=1e-12, atol=0
        )
        chosen = [expert for slots in ids for expert in slots]
        assert routing.counts_E.tolist() == [chosen.count(e) for e in range(EXPERTS)]
        torch.testing.assert_close(
            routing.scores_TE.sum(1), torch.ones(TOKENS, dtype=torch.float64), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_id(dtype) -> None:
    router = build(dtype, top_k=4)
    routing = router(torch.zeros(2, DIM, dtype=dtype), MoEContext(seq_len=2))
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": False}, [5 / 8, 2 / 8]),
        ({"normalize": True}, [5 / 7, 2 / 7]),
        ({"normalize": False, "order": "select_then_score"}, [5 / 7, 2 / 7]),
        ({"normalize": False, "score": "sigmoid"}, [5 / 6, 2 / 3]),
        ({"normalize": True, "score": "sigmoid"}, [5 / 9, 4 / 9]),
        ({"normalize": True, "scaling_factor": 2.5}, [12.5 / 7, 5 / 7]),
    ],
)
def test_gates_by_hand(options, expected) -> None:
    """Logits log 1, log 2, log 5 make softmax scores 1/8, 2/8, 5/8 and sigmoids 1/2, 2/3, 5/6."""
    router = TopKConfig(top_k=2, **options).build(dim=1, num_experts=3)
    router.gate.weight.data = torch.tensor([[1.0], [2.0], [5.0]]).log()
    routing = router(torch.ones(1, 1), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [[2, 1]]
    assert routing.weights_TK.tolist() == [pytest.approx(expected)]


def test_bfloat16_input_is_scored_in_float32() -> None:
    router = build(torch.float32, top_k=2)
    router.gate.weight.data.normal_()
    x = torch.randn(TOKENS, DIM).bfloat16()
    routing = router(x, MoEContext(seq_len=TOKENS))
    exact_TE = x.double() @ router.gate.weight.double().t()
    torch.testing.assert_close(routing.logits_TE.double(), exact_TE, rtol=1e-5, atol=1e-5)
    assert {t.dtype for t in (routing.weights_TK, routing.scores_TE)} == {torch.float32}


def test_the_balancing_bias_selects_but_does_not_weigh() -> None:
    x, context = small_integers(), MoEContext(seq_len=TOKENS)
    router = build(top_k=1, normalize=False, bias_update_rate=0.001)
    scores_TE = router(x, context).scores_TE
    router.expert_bias_E[2] = 10.0
    routing = router(x, MoEContext(seq_len=TOKENS))
    assert routing.expert_ids_TK.unique().tolist() == [2]
    assert torch.equal(routing.weights_TK[:, 0], scores_TE[:, 2])


def test_end_step_moves_the_bias_if_it_has_a_rate() -> None:
    counts_E = torch.tensor([9, 1, 5, 5, 5, 5])
    without, with_bias = build(), build(bias_update_rate=0.5)
    without.end_step(counts_E, 15)
    assert without.state_dict()["expert_bias_E"].tolist() == [0.0] * EXPERTS
    with_bias.end_step(counts_E, 15)
    assert with_bias.state_dict()["expert_bias_E"].tolist() == [-0.5, 0.5, 0, 0, 0, 0]


@pytest.mark.parametrize(("normalize", "learns"), [(True, False), (False, True)])
def test_one_normalised_expert_teaches_the_router_nothing(normalize, learns) -> None:
    """The documented consequence of top_k 1 with normalize: every gate is 1."""
    router = build(top_k=1, normalize=normalize)
    routing = router(small_integers(), MoEContext(seq_len=TOKENS))
    (routing.weights_TK.squeeze(1) * torch.arange(1.0, TOKENS + 1)).sum().backward()
    assert (router.gate.weight.grad.abs().max() > 1e-3) == learns
    if not learns:
        assert router.gate.weight.grad.abs().max() < 1e-14


def test_vanished_sigmoids_give_numbers() -> None:
    router = build(torch.float32, score="sigmoid")
    router.gate.weight.data.fill_(-1.0)
    routing = router(torch.full((1, DIM), 100.0, requires_grad=True), MoEContext(seq_len=1))
    assert routing.logits_TE.sigmoid().sum() == 0
    assert routing.weights_TK.isfinite().all()
    assert routing.scores_TE.isfinite().all()
    (100 * routing.weights_TK + routing.scores_TE[:, :2]).sum().backward()
    assert router.gate.weight.grad.isfinite().all()


def test_jitter_follows_the_token_and_only_in_training() -> None:
    router = build(jitter=0.1)
    x, ids = torch.ones(TOKENS, DIM, dtype=torch.float64), torch.arange(50, 50 + TOKENS)

    def logits(rows: slice = slice(None), **changes) -> Tensor:
        options = {"totals": TOTALS, "token_ids_T": ids[rows], "seed": 1, "step": 2, **changes}
        return router(x[rows], MoEContext(seq_len=1, **options)).logits_TE

    assert torch.equal(logits(slice(2, 4)), logits()[2:4])
    assert torch.equal(logits(micro_batch=3), logits())
    for changes in ({"seed": 7}, {"step": 7}, {"layer": 7}):
        assert not torch.equal(logits(**changes), logits())
    assert torch.equal(logits(totals=None), x @ router.gate.weight.t())


def test_jitter_keeps_its_resolution_in_bfloat16() -> None:
    router = build(torch.float32, jitter=0.01)
    router.gate.weight.data.zero_()[0, 0] = 1.0
    ids = torch.arange(64)
    context = MoEContext(seq_len=64, totals=TOTALS, token_ids_T=ids)
    logits = router(torch.ones(64, DIM, dtype=torch.bfloat16), context).logits_TE[:, 0]
    assert len(logits.unique()) > 60
    assert (logits - 1).abs().max() <= 0.01


def test_a_decision_is_made_once_for_a_micro_batch() -> None:
    router, x = build(top_k=1), small_integers()
    context = MoEContext(seq_len=TOKENS)
    first = router(x, context)
    again = router(-x, context)
    assert torch.equal(again.expert_ids_TK, first.expert_ids_TK)
    other_layer = router(-x, context.at_layer(1))
    assert not torch.equal(other_layer.expert_ids_TK, first.expert_ids_TK)
