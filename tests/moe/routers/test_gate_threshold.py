"""Skipping experts whose score is small, against a loop, and what else it promises."""

import math

import pytest
import torch

from dmoe.config.base import ConfigError
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer, Routing
from dmoe.moe.routers import TopKConfig

TOKENS, DIM, EXPERTS, K = 40, 4, 6, 4
TOTALS = BatchTotals(num_tokens=1, num_targets=1, num_sequences=1, num_micro_batches=1)


def route(threshold: float, bias: float = 0.0, **options) -> Routing:
    generator = torch.Generator().manual_seed(1)
    router = TopKConfig(top_k=K, **options).build(dim=DIM, num_experts=EXPERTS).double()
    router.gate.weight.data = torch.randn(EXPERTS, DIM, generator=generator).double()
    router.expert_bias_E[0] = bias
    x_TD = torch.randn(TOKENS, DIM, generator=generator).double()
    valid_T = torch.arange(TOKENS) % 7 != 3
    return router(x_TD, MoEContext(seq_len=TOKENS, valid_T=valid_T, gate_threshold=threshold))


def skip_by_hand(
    whole: Routing, threshold: float, config: TopKConfig
) -> tuple[list[list[int]], list[list[float]]]:
    """Define the threshold, a token at a time, from the routing without one."""
    ids, gates = [], []
    for chosen, logits in zip(whole.expert_ids_TK.tolist(), whole.logits_TE.tolist(), strict=True):
        if config.score == "softmax":
            scores = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in logits]
        used = [e for e in chosen if e >= 0]
        largest = max((scores[e] for e in used), default=0.0)
        used = [e for e in used if scores[e] >= threshold * largest]
        among = used if config.order == "select_then_score" else range(EXPERTS)
        weights = {e: scores[e] for e in used}
        if config.score == "softmax":
            weights = {e: scores[e] / sum(scores[i] for i in among) for e in used}
        if config.normalize:
            weights = {e: weight / sum(weights.values()) for e, weight in weights.items()}
        ids.append([e if e in used else -1 for e in chosen])
        gates.append([weights.get(e, 0.0) for e in chosen])
    return ids, gates


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["score_then_select", "select_then_score"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [0.0, 5.0])
def test_equals_the_loop(threshold, score, order, normalize, bias) -> None:
    options = {"score": score, "order": order, "normalize": normalize}
    routing = route(threshold, bias, **options)
    ids, gates = skip_by_hand(route(0.0, bias, **options), threshold, TopKConfig(**options))
    assert routing.expert_ids_TK.tolist() == ids
    torch.testing.assert_close(
        routing.weights_TK, torch.tensor(gates, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )
    used = [expert for slots in ids for expert in slots if expert >= 0]
    assert routing.counts_E.tolist() == [used.count(e) for e in range(EXPERTS)]


def test_a_larger_threshold_uses_fewer_and_never_none() -> None:
    counts = [(route(beta).expert_ids_TK >= 0).sum(1) for beta in (0.0, 0.2, 0.6, 0.99)]
    totals = [int(count.sum()) for count in counts]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)
    valid_T = counts[0] > 0
    assert all((count[valid_T] >= 1).all() for count in counts)
    assert not any(count[~valid_T].any() for count in counts), "padding routes nowhere"


def test_vanished_scores_skip_nobody() -> None:
    router = TopKConfig(top_k=2, score="sigmoid").build(dim=DIM, num_experts=EXPERTS)
    router.gate.weight.data.fill_(-1.0)
    context = MoEContext(seq_len=1, gate_threshold=0.5)
    assert router(torch.full((1, DIM), 100.0), context).expert_ids_TK.tolist() == [[0, 1]]


def test_a_layer_runs_with_fewer_rows() -> None:
    layer = MoELayer(MoEConfig(num_experts=EXPERTS, expert_ffn_dim=8), dim=16)
    layer.router.gate.weight.data.normal_()
    x_TD = torch.randn(TOKENS, 16)
    with torch.no_grad():
        y_TD, output = layer(x_TD, MoEContext(seq_len=TOKENS, gate_threshold=0.9))
    assert TOKENS <= output.stats.counts_E.sum() < 2 * TOKENS
    assert y_TD.isfinite().all()


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 3.0, math.nan])
def test_what_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"not in \[0, 1\)"):
        MoEContext(seq_len=1, gate_threshold=threshold)


def test_training_with_one_is_refused() -> None:
    MoEContext(seq_len=1, totals=TOTALS)
    with pytest.raises(ConfigError, match="for inference"):
        MoEContext(seq_len=1, totals=TOTALS, gate_threshold=0.1)
