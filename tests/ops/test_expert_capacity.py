"""Which slots are served, against a loop over slots, under all policies."""

import itertools

import pytest
import torch
from torch import Tensor

from dmoe.ops import CapacityRule, keep_slots
from dmoe.ops.expert_capacity import keep_slots_loop

TOKENS, EXPERTS = 24, 5


def random_ids(seed: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, and gates of four values only, so that they tie."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :top_k]
    return ids_TK, torch.randint(1, 5, ids_TK.shape, generator=generator) / 4


def unused_slots(ids_TK: Tensor) -> Tensor:
    holes = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(9)) < 0.3
    return ids_TK.masked_fill(holes, -1)


def padding(ids_TK: Tensor) -> Tensor:
    """Tokens without a slot: the end of one group of 6 and the whole next."""
    return torch.cat([ids_TK[:4], torch.full_like(ids_TK[4:12], -1), ids_TK[12:]])


SCENARIOS = {
    "plain": lambda ids_TK: ids_TK,
    "unused": unused_slots,
    "all_to_one": lambda ids_TK: torch.full_like(ids_TK, 3),
    "padding": padding,
    "all_padding": lambda ids_TK: torch.full_like(ids_TK, -1),
    "no_tokens": lambda ids_TK: ids_TK[:0],
}


@pytest.mark.parametrize("policy", ["position", "score"])
@pytest.mark.parametrize("group_size", [24, 6, 4, 7, 100])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_equals_the_loop(policy, group_size, scenario) -> None:
    for factor, minimum, top_k, slots in itertools.product(
        [0.01, 0.5, 1.0, 1.25, 100.0], [0, 1, 4], [1, 3], ["used", "all"]
    ):
        rule, seed = CapacityRule(factor, minimum, group_size, policy, slots), top_k
        ids_TK, weights_TK = random_ids(seed, top_k)
        ids_TK = SCENARIOS[scenario](ids_TK)
        arguments = (ids_TK, weights_TK[: len(ids_TK)], EXPERTS, rule)
        kept_TK = keep_slots(*arguments)
        assert torch.equal(kept_TK, keep_slots_loop(*arguments))
        assert torch.equal(kept_TK[kept_TK >= 0], ids_TK[kept_TK >= 0])
