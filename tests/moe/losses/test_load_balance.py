"""The load-balancing loss: by hand, and the same for every partition of the global batch."""

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals
from dmoe.moe.losses import LossesConfig, load_balance_loss
from dmoe.moe.routing import Routing, make_routing

SEQUENCES, SEQ_LEN, EXPERTS, TOP_K = 6, 5, 4, 2


def routing_of(scores_TE: Tensor, ids_TK: Tensor) -> Routing:
    weights_TK = torch.ones(ids_TK.shape, dtype=scores_TE.dtype)
    return make_routing(scores_TE, scores_TE, ids_TK, weights_TK)


def totals_of(num_tokens: int, num_sequences: int = 1, num_micro_batches: int = 1) -> BatchTotals:
    return BatchTotals(num_tokens, num_tokens, num_sequences, num_micro_batches)


def random_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Scores that want gradients, ids, and a mask: one sequence is short, one all padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES * SEQ_LEN, EXPERTS)
    logits_TE = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores_TE = logits_TE.softmax(-1).requires_grad_()
    valid_T = torch.ones(len(scores_TE), dtype=torch.bool)
    valid_T[SEQ_LEN - 2 : 2 * SEQ_LEN] = False
    ids_TK = scores_TE.topk(TOP_K).indices.masked_fill(~valid_T[:, None], -1)
    return scores_TE, ids_TK, valid_T


def formula(scores_TE: Tensor, ids_TK: Tensor, valid_T: Tensor) -> Tensor:
    """Define the loss of one set of tokens: E sum_i f_i P_i."""
    used = ids_TK[valid_T].flatten().tolist()
    if not used:
        return scores_TE.sum() * 0
    means = scores_TE[valid_T].mean(0)
    return EXPERTS * sum(means[i] * (used.count(i) / len(used)) for i in range(EXPERTS))


def share(scores_TE: Tensor, ids_TK: Tensor, valid_T: Tensor, part: Tensor, **options) -> Tensor:
    routing = routing_of(scores_TE[part], ids_TK[part])
    return load_balance_loss(routing, valid_T=valid_T[part], seq_len=SEQ_LEN, **options)


def assert_same_with_gradient(actual: Tensor, expected: Tensor, scores_TE: Tensor) -> None:
    gradients = [torch.autograd.grad(loss, scores_TE)[0] for loss in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_by_hand(scope) -> None:
    """Both tokens chose expert 0: f = (1, 0), P = (0.625, 0.375), so 2 (1 x 0.625) = 1.25."""
    routing = routing_of(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0], [0]]))
    totals, counts_E = totals_of(2), torch.tensor([2, 0])
    loss = load_balance_loss(routing, totals, scope=scope, seq_len=2, counts_E=counts_E)
    assert loss.item() == 1.25


def test_gshard_by_hand() -> None:
    """Two local groups of two tokens; f counts first choices, c_e / S in the paper.

    Group 0: f = (1, 0), P = (0.7, 0.3), so 2 x 0.7; group 1: f = (0.5, 0.5), so 1. The paper's loss
    is divided by E where ours is multiplied.
    """
    scores_TE = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    ids_TK = torch.tensor([[0, 1], [0, -1], [0, 1], [1, 0]])
    options = {"scope": 2, "seq_len": 4, "choices": "first"}
    loss = load_balance_loss(routing_of(scores_TE, ids_TK), totals_of(4), **options)
    assert loss.item() == pytest.approx((1.4 + 1) / 2)


def test_first_choices_over_the_global_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="load_balance_choices = first"):
        LossesConfig(load_balance_choices="first")


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_is_one_at_perfect_balance(scope, top_k) -> None:
    ids_TK = (torch.arange(4)[:, None] + torch.arange(top_k)) % 4
    routing = routing_of(torch.full((4, 4), 0.25), ids_TK)
    loss = load_balance_loss(
        routing, totals_of(4), scope=scope, seq_len=4, counts_E=routing.counts_E
    )
    assert loss.item() == pytest.approx(1)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_global_shares_of_any_partition_sum_to_the_loss(num_parts) -> None:
    scores_TE, ids_TK, valid_T = random_batch()
    generator = torch.Generator().manual_seed(num_parts)
    parts = torch.randperm(len(scores_TE), generator=generator).tensor_split(num_parts)
    options = {
        "totals": totals_of(int(valid_T.sum())),
        "scope": "global_batch",
        "counts_E": routing_of(scores_TE, ids_TK).counts_E,
    }
    shares = [share(scores_TE, ids_TK, valid_T, part, **options) for part in parts]
    assert_same_with_gradient(sum(shares), formula(scores_TE, ids_TK, valid_T), scores_TE)


@pytest.mark.parametrize(
    ("scope", "sizes"),
    [(s, sizes) for s in ("sequence", "micro_batch") for sizes in ([6], [1, 5], [2] * 3, [1] * 6)]
    # Micro-batches of unequal size have no common number of groups.
    + [(4, [6]), (4, [2] * 3), (4, [1] * 6)],
)
def test_the_loss_is_the_mean_over_sequences_or_micro_batches(scope, sizes) -> None:
    """A set of tokens that is all padding counts as zero."""
    scores_TE, ids_TK, valid_T = random_batch()
    parts = torch.arange(len(scores_TE)).split([SEQ_LEN * size for size in sizes])
    totals = totals_of(int(valid_T.sum()), SEQUENCES, len(parts))
    shares = [share(scores_TE, ids_TK, valid_T, part, totals=totals, scope=scope) for part in parts]
    size = SEQ_LEN if scope == "sequence" else scope
    groups = parts
    if scope != "micro_batch":
        groups = [group for part in parts for group in part.split(size)]
    losses = [formula(scores_TE[g], ids_TK[g], valid_T[g]) for g in groups]
    assert_same_with_gradient(sum(shares), sum(losses) / len(groups), scores_TE)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("num_tokens", [0, SEQ_LEN])
def test_nothing_but_padding_is_zero(scope, num_tokens) -> None:
    scores_TE = torch.full((num_tokens, EXPERTS), 1 / EXPERTS, requires_grad=True)
    routing = routing_of(scores_TE, torch.full((num_tokens, TOP_K), -1))
    loss = load_balance_loss(
        routing,
        totals_of(1),
        scope=scope,
        seq_len=SEQ_LEN,
        valid_T=torch.zeros(num_tokens, dtype=torch.bool),
        counts_E=routing.counts_E,
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores_TE.grad, torch.zeros_like(scores_TE))
