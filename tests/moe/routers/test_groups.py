"""Group-limited top-k of DeepSeek-V2 and V3, against a loop in plain Python."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dmoe.moe import BatchTotals, MoEConfig, MoEContext
from dmoe.moe.routers import TopKConfig, TopKRouter

TOKENS, DIM, EXPERTS = 40, 4, 12


def build(top_k: int = 4, **options: object) -> TopKRouter:
    groups = {"num": 4, "used": 2, **options}
    config = TopKConfig.model_validate({"top_k": top_k, "score": "sigmoid", "groups": groups})
    router = config.build(dim=DIM, num_experts=EXPERTS).double()
    generator = torch.Generator().manual_seed(1)
    router.gate.weight.data.copy_(torch.randint(-1, 2, (EXPERTS, DIM), generator=generator))
    router.expert_bias_E.copy_(torch.randint(-1, 2, (EXPERTS,), generator=generator) * 0.25)
    return router


def tokens() -> Tensor:
    """Small integers: many scores are equal, and so are those of groups."""
    return torch.randint(-1, 2, (TOKENS, DIM), generator=torch.Generator().manual_seed(2)).double()


def choose_loop(keys: list[float], num: int, used: int, scored: int, k: int) -> list[int]:
    """Define the choice of one token."""
    size = len(keys) // num
    members = [range(group * size, (group + 1) * size) for group in range(num)]
    worth = [sum(sorted((keys[e] for e in m), reverse=True)[:scored]) for m in members]
    groups = sorted(range(num), key=lambda g: (-worth[g], g))[: max(used, -(-k // size))]
    allowed = [e for group in groups for e in members[group]]
    return sorted(allowed, key=lambda e: (-keys[e], e))[:k]


@pytest.mark.parametrize("scored_by", [None, 1, 3])
@pytest.mark.parametrize("used", [2, 3, 4])
@pytest.mark.parametrize("k", [None, 1, 6, 12])
def test_equals_the_loop(scored_by: int | None, used: int, k: int | None) -> None:
    router = build(used=used, scored_by=scored_by)
    routing = router(tokens(), MoEContext(seq_len=TOKENS, k_L=None if k is None else (k,)))
    keys_TE = router.gate(tokens()).sigmoid() + router.expert_bias_E
    scored = scored_by or 4 // used
    for ids, keys in zip(routing.expert_ids_TK.tolist(), keys_TE.tolist(), strict=True):
        assert ids == choose_loop(keys, 4, used, scored, k or 4)
    chosen = router.gate(tokens()).sigmoid().gather(1, routing.expert_ids_TK)
    torch.testing.assert_close(routing.weights_TK, chosen / chosen.sum(1, keepdim=True))


def test_each_token_with_a_number_of_its_own() -> None:
    router, k_T = build(), torch.arange(TOKENS) % 12 + 1
    routing = router(tokens(), MoEContext(seq_len=TOKENS, k_L=(k_T,)))
    keys_TE = router.gate(tokens()).sigmoid() + router.expert_bias_E
    for row, keys, k in zip(routing.expert_ids_TK.tolist(), keys_TE.tolist(), k_T, strict=True):
        assert [e for e in row if e >= 0] == choose_loop(keys, 4, 2, 2, int(k))


def test_random_subsets_come_from_the_pool_within_the_groups() -> None:
    router, k_T = build(), torch.arange(TOKENS) % 4 + 1
    totals = BatchTotals(TOKENS, TOKENS, 1, 1)
    context = MoEContext(
        seq_len=TOKENS, k_L=(k_T,), k_ideal=8, totals=totals, token_ids_T=torch.arange(TOKENS)
    )
    routing = router(tokens(), context)
    keys_TE = router.gate(tokens()).sigmoid() + router.expert_bias_E
    for row, keys in zip(routing.expert_ids_TK.tolist(), keys_TE.tolist(), strict=True):
        assert {e for e in row if e >= 0} <= set(choose_loop(keys, 4, 2, 2, 8))


def test_by_hand() -> None:
    """Two groups of two: the best single expert is in the first, the better pair in the second."""
    config = TopKConfig.model_validate({"top_k": 2, "groups": {"num": 2, "used": 1}})
    router = config.build(dim=1, num_experts=4).double()
    router.gate.weight.data = torch.tensor([[5.0], [1.0], [4.0], [3.0]]).double().log()
    one = torch.ones(1, 1).double()
    assert router(one, MoEContext(seq_len=1)).expert_ids_TK.tolist() == [[2, 3]]
    best = config.model_copy(update={"groups": config.groups.model_copy(update={"scored_by": 1})})
    router.config = best
    assert router(one, MoEContext(seq_len=1)).expert_ids_TK.tolist() == [[0, 1]]


def test_no_more_groups_are_used_than_allowed() -> None:
    for top_k, used in itertools.product((1, 3, 6), (2, 3)):
        ids_TK = build(top_k, used=used)(tokens(), MoEContext(seq_len=TOKENS)).expert_ids_TK
        assert max(len(set((row // 3).tolist())) for row in ids_TK) <= used


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"groups": {"num": 2, "used": 3}}, "groups.used = 3 is more than groups.num = 2"),
        ({"groups": {"num": 5, "used": 3}}, "groups.num = 5 does not divide num_experts = 8"),
        ({"top_k": 5, "groups": {"num": 4, "used": 2}}, "more than the 4 experts of router.groups"),
        (
            {"groups": {"num": 4, "used": 2, "scored_by": 3}},
            "scored_by = 3 is more than the 2 experts of a group",
        ),
    ],
)
def test_what_does_not_fit_is_refused(router: dict[str, object], message: str) -> None:
    tree = {"num_experts": 8, "expert_ffn_dim": 8, "router": {"name": "top_k", **router}}
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate(tree)
