"""Expert threshold routing: cutoffs, running means, and that no token sees another."""

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import ExpertThresholdConfig, ExpertThresholdRouter

TOKENS, DIM, EXPERTS = 32, 6, 4
TOTALS = BatchTotals(TOKENS, TOKENS, 1, 1)


def build(**options: object) -> ExpertThresholdRouter:
    config = ExpertThresholdConfig(name="expert_threshold", **options)
    router = config.build(dim=DIM, num_experts=EXPERTS).double()
    generator = torch.Generator().manual_seed(1)
    router.gate.weight.data.normal_(generator=generator)
    return router


def tokens(seed: int = 2) -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).double()


def sums(router: ExpertThresholdRouter, x_TD: Tensor, **context: object) -> Tensor:
    routing = router(x_TD, MoEContext(seq_len=len(x_TD), totals=TOTALS, **context))
    return routing.sums["cutoff"]


def test_cutoffs_by_hand() -> None:
    """A share of 8 x 2 / 4 = 4 tokens an expert: the cutoff is the fourth largest score."""
    router, x_TD = build(target_k=2), tokens()[:8]
    scores_TE = router.gate(x_TD).sigmoid()
    expected = [sorted(column, reverse=True)[3] for column in scores_TE.T.tolist()]
    assert (sums(router, x_TD) / 8).tolist() == pytest.approx(expected)
    valid_T = torch.arange(8) < 4
    expected = [sorted(column, reverse=True)[1] for column in scores_TE[:4].T.tolist()]
    assert (sums(router, x_TD, valid_T=valid_T) / 4).tolist() == pytest.approx(expected)
    assert not sums(router, x_TD, valid_T=torch.zeros(8, dtype=torch.bool)).any()


def test_the_running_mean_by_hand() -> None:
    router = build(decay=0.9)
    counts = torch.ones(EXPERTS, dtype=torch.int64)
    for cutoff in (0.5, 0.7):
        router.end_step(counts, 4, {"cutoff": torch.full((EXPERTS,), cutoff).double()})
    expected = (0.9 * 0.1 * 0.5 + 0.1 * 0.7) / (0.9 * 0.1 + 0.1)
    assert router.thresholds().tolist() == pytest.approx([expected] * EXPERTS)
    router.end_step(torch.zeros(EXPERTS, dtype=torch.int64), 1, {"cutoff": torch.zeros(EXPERTS)})
    assert router.thresholds().tolist() == pytest.approx([expected] * EXPERTS), "only padding"


def test_a_token_has_the_experts_whose_threshold_it_exceeds() -> None:
    router, x_TD = build(), tokens()
    thresholds = torch.tensor([0.5, 0.2, 0.9, 0.999]).double()
    router.end_step(torch.ones(EXPERTS), 4, {"cutoff": thresholds})
    routing = router(x_TD, MoEContext(seq_len=TOKENS))
    scores_TE = router.gate(x_TD).sigmoid()
    for ids, gates, scores in zip(
        routing.expert_ids_TK.tolist(), routing.weights_TK.tolist(), scores_TE.tolist(), strict=True
    ):
        chosen = [e for e in range(EXPERTS) if scores[e] > thresholds[e]]
        assert [e for e in ids if e >= 0] == chosen
        assert gates[: len(chosen)] == pytest.approx([scores[e] for e in chosen])


def test_causal_once_there_are_thresholds() -> None:
    router, x_TD = build(), tokens()
    before = router(x_TD, MoEContext(seq_len=TOKENS)).expert_ids_TK[:-1]
    changed = torch.cat([x_TD[:-1], 50 * x_TD[1:2]])
    assert not torch.equal(before, router(changed, MoEContext(seq_len=TOKENS)).expert_ids_TK[:-1])
    router.end_step(torch.ones(EXPERTS), TOKENS, {"cutoff": sums(router, x_TD) / TOKENS})
    before = router(x_TD, MoEContext(seq_len=TOKENS))
    after = router(changed, MoEContext(seq_len=TOKENS))
    alone = router(x_TD[:1], MoEContext(seq_len=1))
    first = [e for e in before.expert_ids_TK[0].tolist() if e >= 0]
    assert [e for e in alone.expert_ids_TK[0].tolist() if e >= 0] == first
    for row, other in zip(
        before.expert_ids_TK[:-1].tolist(), after.expert_ids_TK.tolist(), strict=False
    ):
        assert {e for e in row if e >= 0} == {e for e in other if e >= 0}


def test_the_load_comes_out_even() -> None:
    """Experts that all tokens like, and such that none does, get the same share."""
    router = build(target_k=1.5, decay=0.9)
    router.gate.weight.data[:, 0] = torch.tensor([3.0, 1.0, -1.0, -3.0])
    counts = torch.zeros(EXPERTS)
    for step in range(60):
        x_TD = tokens(step)
        x_TD[:, 0] = 1
        routing = router(x_TD, MoEContext(seq_len=TOKENS, totals=TOTALS))
        cutoff = {"cutoff": routing.sums["cutoff"] / TOKENS}
        router.end_step(routing.counts_E, TOKENS, cutoff)
        counts += routing.counts_E if step >= 20 else 0
    assert (counts / 40 / TOKENS).tolist() == pytest.approx([1.5 / 4] * 4, rel=0.1)


def test_a_number_of_experts_at_inference_is_the_plain_top_k() -> None:
    router, x_TD = build(), tokens()
    ids_TK = router(x_TD, MoEContext(seq_len=TOKENS, k_L=(2,))).expert_ids_TK
    assert torch.equal(ids_TK, router.gate(x_TD).topk(2).indices)


def test_a_step_without_experts_lowers_the_thresholds_and_one_of_padding_does_not() -> None:
    router, x_TD = build(decay=0.5), tokens()
    router.cutoff_E.fill_(0.95)
    router.weight_sum.fill_(1.0)
    x_TD = x_TD * 0.1  # scores of about a half
    routing = router(x_TD, MoEContext(seq_len=TOKENS, totals=TOTALS))
    assert not routing.counts_E.any()
    router.end_step(routing.counts_E, TOKENS, {"cutoff": torch.zeros(EXPERTS)})
    assert router.thresholds().tolist() == pytest.approx([0.95] * EXPERTS)
    router.end_step(routing.counts_E, TOKENS, {"cutoff": routing.sums["cutoff"] / TOKENS})
    assert (router.thresholds() < 0.8).all()
