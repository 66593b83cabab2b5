"""Capacity against its loop twin over all policies, and its meaning in small examples."""

import itertools

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext, Routing
from dmoe.moe.capacity import (
    CapacityConfig,
    apply_capacity,
    keep_within_capacity,
    keep_within_capacity_loop,
)
from dmoe.moe.routing import make_routing

SEQ_LEN, EXPERTS = 6, 5


def routing_of(ids_TK: Tensor, weights_TK: Tensor, num_experts: int = EXPERTS) -> Routing:
    scores_TE = torch.zeros(len(ids_TK), num_experts)
    return make_routing(scores_TE, scores_TE, ids_TK, weights_TK)


def random_ids(seed: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts for each of 24 tokens, and gates of four values only, so that they tie."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(4 * SEQ_LEN, EXPERTS, generator=generator).argsort(1)[:, :top_k]
    weights_TK = torch.randint(1, 5, ids_TK.shape, generator=generator) / 4
    return ids_TK, weights_TK


def unused_slots(ids_TK: Tensor) -> tuple[Tensor, Tensor | None]:
    holes = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(9)) < 0.3
    return ids_TK.masked_fill(holes, -1), None


def one_expert_gets_all(ids_TK: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.full_like(ids_TK, 3), None


def padding(ids_TK: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first sequence is short, the second is all padding."""
    valid_T = torch.ones(len(ids_TK), dtype=torch.bool)
    valid_T[SEQ_LEN - 2 : 2 * SEQ_LEN] = False
    return ids_TK.masked_fill(~valid_T[:, None], -1), valid_T


def nothing_but_padding(ids_TK: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.full_like(ids_TK, -1), torch.zeros(len(ids_TK), dtype=torch.bool)


def no_tokens(ids_TK: Tensor) -> tuple[Tensor, Tensor | None]:
    return ids_TK[:0], None


@pytest.mark.parametrize("policy", ["position", "score"])
@pytest.mark.parametrize("group", ["micro_batch", "sequence", 4, 7])
@pytest.mark.parametrize(
    "scenario",
    [
        lambda ids_TK: (ids_TK, None),
        unused_slots,
        one_expert_gets_all,
        padding,
        nothing_but_padding,
        no_tokens,
    ],
    ids=["plain", "unused", "all_to_one", "padding", "all_padding", "no_tokens"],
)
def test_equals_the_loop(policy, group, scenario) -> None:
    for factor, minimum, top_k, seed in itertools.product(
        [0.01, 0.5, 1.0, 1.25, 100.0], [0, 1, 4], [1, 3], range(2)
    ):
        config = CapacityConfig(factor=factor, policy=policy, minimum=minimum, group=group)
        ids_TK, weights_TK = random_ids(seed, top_k)
        ids_TK, valid_T = scenario(ids_TK)
        routing = routing_of(ids_TK, weights_TK[: len(ids_TK)])
        context = MoEContext(seq_len=SEQ_LEN, valid_T=valid_T)
        kept_TK = keep_within_capacity(routing, config, context)
        assert torch.equal(kept_TK, keep_within_capacity_loop(routing, config, context))
        assert torch.equal(kept_TK[kept_TK >= 0], ids_TK[kept_TK >= 0])


def test_position_serves_first_choices_first() -> None:
    """Two slots an expert: token 2's first choice of expert 0 goes before token 0's second."""
    ids_TK = torch.tensor([[1, 0], [0, 1], [0, 1]])
    config = CapacityConfig(factor=0.5, minimum=0)
    routing = routing_of(ids_TK, torch.ones(3, 2), num_experts=2)
    kept_TK = keep_within_capacity(routing, config, MoEContext(seq_len=3))
    assert kept_TK.tolist() == [[1, -1], [0, 1], [0, -1]]


def test_a_local_group_has_a_capacity_of_its_own() -> None:
    """Groups of 2 of 5 tokens, two experts, factor 1: one slot an expert, in the last group too."""
    ids_TK = torch.zeros(5, 1, dtype=torch.int64)
    config = CapacityConfig(factor=1.0, minimum=0, group=2)
    routing = routing_of(ids_TK, torch.ones(5, 1), num_experts=2)
    kept_TK = keep_within_capacity(routing, config, MoEContext(seq_len=5))
    assert kept_TK.flatten().tolist() == [0, -1, 0, -1, 0]


def test_second_choices_come_after_all_first_ones_also_where_some_are_not_sent() -> None:
    """GShard: token 0's second choice, expert 1, is placed after token 2's first. Token 1 has none.

    Five slots, two experts: factor 0.8 is a capacity of 2.
    """
    ids_TK = torch.tensor([[0, 1], [1, -1], [1, 0]])
    config = CapacityConfig(factor=0.8, minimum=0)
    routing = routing_of(ids_TK, torch.ones(3, 2), num_experts=2)
    kept_TK = keep_within_capacity(routing, config, MoEContext(seq_len=3))
    assert kept_TK.tolist() == [[0, -1], [1, -1], [1, 0]]


def test_outside_training_the_factor_may_be_another() -> None:
    ids_TK = torch.zeros(4, 1, dtype=torch.int64)
    config = CapacityConfig(factor=1.0, eval_factor=2.0, minimum=0)
    routing = routing_of(ids_TK, torch.ones(4, 1), num_experts=4)
    for totals, num_kept in ((BatchTotals(4, 4, 1, 1), 1), (None, 2)):
        context = MoEContext(seq_len=4, totals=totals)
        assert (keep_within_capacity(routing, config, context) >= 0).sum() == num_kept
        assert (keep_within_capacity_loop(routing, config, context) >= 0).sum() == num_kept


def test_score_serves_the_largest_gates() -> None:
    ids_TK = torch.zeros(4, 1, dtype=torch.int64)
    weights_TK = torch.tensor([[0.2], [0.9], [0.5], [0.9]])
    config = CapacityConfig(factor=1.0, policy="score", minimum=0)
    routing = routing_of(ids_TK, weights_TK, num_experts=2)
    kept_TK = keep_within_capacity(routing, config, MoEContext(seq_len=4))
    assert kept_TK.flatten().tolist() == [-1, 0, -1, 0]


@pytest.mark.parametrize(
    ("factor", "minimum", "num_kept"), [(1.0, 0, 2), (1.01, 0, 3), (0.01, 0, 1), (0.01, 5, 5)]
)
def test_capacity_by_hand(factor, minimum, num_kept) -> None:
    """8 tokens, 4 experts, one slot each: factor 1 is 2 slots, and fractions round up."""
    ids_TK = torch.zeros(8, 1, dtype=torch.int64)
    config = CapacityConfig(factor=factor, minimum=minimum)
    routing = routing_of(ids_TK, torch.ones(8, 1), num_experts=4)
    kept_TK = keep_within_capacity(routing, config, MoEContext(seq_len=8))
    assert kept_TK.flatten().tolist() == [0] * num_kept + [-1] * (8 - num_kept)


@pytest.mark.parametrize(("k_of_token", "num_kept"), [([1] * 8, 2), ([2] * 8, 4), ([1, 3] * 4, 4)])
def test_capacity_follows_the_number_of_slots(k_of_token, num_kept) -> None:
    """8 tokens, 4 experts, factor 1: 8 slots make a capacity of 2, 16 slots one of 4."""
    place_K = torch.arange(3)
    ids_TK = place_K.expand(8, 3).masked_fill(place_K >= torch.tensor(k_of_token)[:, None], -1)
    config = CapacityConfig(factor=1.0, minimum=0)
    routing = routing_of(ids_TK, torch.ones(8, 3), num_experts=4)
    kept_TK = keep_within_capacity(routing, config, MoEContext(seq_len=8))
    assert (kept_TK == 0).sum() == num_kept


def test_sequences_do_not_share_capacity() -> None:
    """A sequence is served alike alone and beside another."""
    ids_TK, weights_TK = random_ids(0, 2)
    config = CapacityConfig(factor=0.5, minimum=0, group="sequence")
    together = keep_within_capacity(
        routing_of(ids_TK, weights_TK), config, MoEContext(seq_len=SEQ_LEN)
    )
    alone = [
        keep_within_capacity(routing_of(ids, weights), config, MoEContext(seq_len=SEQ_LEN))
        for ids, weights in zip(ids_TK.split(SEQ_LEN), weights_TK.split(SEQ_LEN), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_a_dropped_slot_has_no_weight_and_no_gradient() -> None:
    ids_TK = torch.zeros(3, 1, dtype=torch.int64)
    weights_TK = torch.full((3, 1), 0.5, requires_grad=True)
    routing = routing_of(ids_TK, weights_TK, num_experts=3)
    served = apply_capacity(routing, CapacityConfig(factor=1, minimum=0), MoEContext(seq_len=3))
    assert served.expert_ids_TK.flatten().tolist() == [0, -1, -1]
    assert served.weights_TK.flatten().tolist() == [0.5, 0, 0]
    assert served.counts_E.tolist() == [3, 0, 0], "the router's counts, not the served ones"
    served.weights_TK.sum().backward()
    assert weights_TK.grad.flatten().tolist() == [1, 0, 0]
