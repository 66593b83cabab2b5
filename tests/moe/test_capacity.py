"""What capacity means, in small examples."""

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, Routing
from dmoe.moe.capacity import CapacityConfig, apply_capacity
from dmoe.moe.routing import make_routing
from dmoe.ops import places_of

SEQ_LEN, EXPERTS = 6, 5
TOTALS = BatchTotals(20, 20, 2, 1)


def routing_of(ids_TK: Tensor, weights_TK: Tensor, num_experts: int = EXPERTS) -> Routing:
    scores_TE = torch.zeros(len(ids_TK), num_experts)
    return make_routing(scores_TE, scores_TE, ids_TK, weights_TK)


def kept_ids(routing: Routing, config: CapacityConfig, context: MoEContext) -> Tensor:
    return apply_capacity(routing, config, context).expert_ids_TK


def test_position_serves_first_choices_first() -> None:
    """Two slots an expert: token 2's first choice of expert 0 goes before token 0's second."""
    ids_TK = torch.tensor([[1, 0], [0, 1], [0, 1]])
    config = CapacityConfig(factor=0.5, minimum=0)
    routing = routing_of(ids_TK, torch.ones(3, 2), num_experts=2)
    kept_TK = kept_ids(routing, config, MoEContext(seq_len=3))
    assert kept_TK.tolist() == [[1, -1], [0, 1], [0, -1]]


def test_a_local_group_has_a_capacity_of_its_own() -> None:
    """Groups of 2 of 5 tokens, two experts, factor 1: one slot an expert, in the last group too."""
    ids_TK = torch.zeros(5, 1, dtype=torch.int64)
    config = CapacityConfig(factor=1.0, minimum=0, group=2)
    routing = routing_of(ids_TK, torch.ones(5, 1), num_experts=2)
    kept_TK = kept_ids(routing, config, MoEContext(seq_len=5))
    assert kept_TK.flatten().tolist() == [0, -1, 0, -1, 0]


def test_second_choices_come_after_all_first_ones_also_where_some_are_not_sent() -> None:
    """GShard: token 0's second choice, expert 1, is placed after token 2's first. Token 1 has none.

    Five slots, two experts: factor 0.8 is a capacity of 2.
    """
    ids_TK = torch.tensor([[0, 1], [1, -1], [1, 0]])
    config = CapacityConfig(factor=0.8, minimum=0)
    routing = routing_of(ids_TK, torch.ones(3, 2), num_experts=2)
    kept_TK = kept_ids(routing, config, MoEContext(seq_len=3))
    assert kept_TK.tolist() == [[0, -1], [1, -1], [1, 0]]


def test_capacity_may_count_all_slots_of_a_token() -> None:
    """GShard: three tokens of two slots, two experts, factor 1: three slots an expert, not two."""
    ids_TK = torch.tensor([[0, -1], [0, -1], [0, 1], [-1, -1]])
    routing = routing_of(ids_TK, torch.ones(4, 2), num_experts=2)
    for slots, kept in (("used", [0, 0, -1]), ("all", [0, 0, 0])):
        config = CapacityConfig(factor=1.0, minimum=0, slots=slots)
        kept_TK = kept_ids(routing, config, MoEContext(seq_len=4))
        assert kept_TK[:3, 0].tolist() == kept


def test_outside_training_the_factor_may_be_another() -> None:
    ids_TK = torch.zeros(4, 1, dtype=torch.int64)
    config = CapacityConfig(factor=1.0, eval_factor=2.0, minimum=0)
    routing = routing_of(ids_TK, torch.ones(4, 1), num_experts=4)
    for totals, num_kept in ((BatchTotals(4, 4, 1, 1), 1), (None, 2)):
        context = MoEContext(seq_len=4, totals=totals)
        assert (kept_ids(routing, config, context) >= 0).sum() == num_kept


def test_score_serves_the_largest_gates() -> None:
    ids_TK = torch.zeros(4, 1, dtype=torch.int64)
    weights_TK = torch.tensor([[0.2], [0.9], [0.5], [0.9]])
    config = CapacityConfig(factor=1.0, policy="score", minimum=0)
    routing = routing_of(ids_TK, weights_TK, num_experts=2)
    kept_TK = kept_ids(routing, config, MoEContext(seq_len=4))
    assert kept_TK.flatten().tolist() == [-1, 0, -1, 0]


@pytest.mark.parametrize(
    ("factor", "minimum", "num_kept"), [(1.0, 0, 2), (1.01, 0, 3), (0.01, 0, 1), (0.01, 5, 5)]
)
def test_capacity_by_hand(factor, minimum, num_kept) -> None:
    """8 tokens, 4 experts, one slot each: factor 1 is 2 slots, and fractions round up."""
    ids_TK = torch.zeros(8, 1, dtype=torch.int64)
    config = CapacityConfig(factor=factor, minimum=minimum)
    routing = routing_of(ids_TK, torch.ones(8, 1), num_experts=4)
    kept_TK = kept_ids(routing, config, MoEContext(seq_len=8))
    assert kept_TK.flatten().tolist() == [0] * num_kept + [-1] * (8 - num_kept)


@pytest.mark.parametrize(("k_of_token", "num_kept"), [([1] * 8, 2), ([2] * 8, 4), ([1, 3] * 4, 4)])
def test_capacity_follows_the_number_of_slots(k_of_token, num_kept) -> None:
    """8 tokens, 4 experts, factor 1: 8 slots make a capacity of 2, 16 slots one of 4."""
    place_K = torch.arange(3)
    ids_TK = place_K.expand(8, 3).masked_fill(place_K >= torch.tensor(k_of_token)[:, None], -1)
    config = CapacityConfig(factor=1.0, minimum=0)
    routing = routing_of(ids_TK, torch.ones(8, 3), num_experts=4)
    kept_TK = kept_ids(routing, config, MoEContext(seq_len=8))
    assert (kept_TK == 0).sum() == num_kept


def test_sequences_do_not_share_capacity() -> None:
    """A sequence is served alike alone and beside another."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(4 * SEQ_LEN, EXPERTS, generator=generator).argsort(1)[:, :2]
    weights_TK = torch.ones(ids_TK.shape)
    config = CapacityConfig(factor=0.5, minimum=0, group="sequence")
    together = kept_ids(routing_of(ids_TK, weights_TK), config, MoEContext(seq_len=SEQ_LEN))
    alone = [
        kept_ids(routing_of(ids, weights), config, MoEContext(seq_len=SEQ_LEN))
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


BUFFERED = {
    "more samples than in training": (
        {"infinite": {"granularity": "block", "samples": 1, "inference_samples": 4}},
        {},
    ),
    "a k of its own above elastic": (
        {
            "router": {"name": "top_k", "top_k": 5},
            "elastic": {"k_min": 1, "k_max": 4},
        },
        {},
    ),
    "a larger k": ({}, {"k_L": (5,)}),
    "a k for each token": ({}, {"k_L": (torch.arange(20) % 2 + 1,), "totals": TOTALS}),
    "all experts": ({"router": {"name": "soft_gate"}}, {}),
    "top p": ({"router": {"name": "top_p", "p": 0.9}}, {"totals": TOTALS}),
    "no networks": ({"zero_computation": {"zeros": 5}}, {"valid_T": torch.arange(20) % 3 > 0}),
}


@pytest.mark.parametrize("factor", [0.3, 0.55, 1.1])
@pytest.mark.parametrize("group", ["sequence", 7])
@pytest.mark.parametrize(("options", "context"), BUFFERED.values(), ids=list(BUFFERED))
def test_buffers_hold_all_that_is_served(options, context, group, factor: float) -> None:
    """Forward and gradients are those of rows that are sent as they are."""
    results = []
    for dispatch in ("auto", "buffers"):
        torch.manual_seed(0)
        capacity = {"factor": factor, "minimum": 0, "group": group}
        tree = {"num_experts": 5, "expert_ffn_dim": 8, "capacity": capacity, "dispatch": dispatch}
        layer = MoEConfig.model_validate({**tree, **options}).build(dim=6, activation="gelu")
        layer = layer.double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        x_TD = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
        made = MoEContext(seq_len=10, token_ids_T=torch.arange(20), **context)
        y_TD, output = layer(x_TD, made)
        y_TD.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([y_TD, output.stats.dropped, x_TD.grad, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_more_slots_than_places_are_found_out() -> None:
    with pytest.raises(AssertionError, match="more slots than places"):
        places_of(torch.zeros(3, 1, dtype=torch.int64), 2, 2)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"dispatch": "buffers"}, "and there is none: add capacity"),
        (
            {"dispatch": "buffers", "capacity": {"factor": 1}, "dispatch_dtype": "fp8"},
            "does not go with dispatch = buffers",
        ),
        (
            {"dispatch": "buffers", "router": {"name": "soft_moe"}},
            "router.name = soft_moe has a layer of its own: leave dispatch out",
        ),
    ],
)
def test_buffers_that_do_not_fit_are_refused(tree, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.model_validate({"num_experts": 4, "expert_ffn_dim": 8, **tree})
