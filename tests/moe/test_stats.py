import math

import pytest
import torch

from dmoe.moe import MoEContext
from dmoe.moe.routing import make_routing
from dmoe.moe.stats import measure


def test_sums_by_hand() -> None:
    """Three tokens of which the last is padding; four experts; one slot found no capacity."""
    scores_TE = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [0.25] * 4])
    ids_TK = torch.tensor([[0, 3], [0, 1], [-1, -1]])
    routing = make_routing(scores_TE.log(), scores_TE, ids_TK, torch.ones(3, 2))
    context = MoEContext(seq_len=3, valid_T=torch.tensor([True, True, False]))
    stats = measure(routing, torch.tensor(1), context)
    assert stats.counts_E.tolist() == [2, 1, 0, 1]
    assert stats.dropped == 1
    assert stats.sums["entropy"].item() == pytest.approx(1 + math.log(2) / math.log(4))


def test_one_expert_has_no_entropy() -> None:
    routing = make_routing(
        torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    )
    assert measure(routing, torch.tensor(0), MoEContext(seq_len=2)).sums["entropy"] == 0
