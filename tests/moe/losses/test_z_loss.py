import math

import pytest
import torch

from dmoe.moe import BatchTotals
from dmoe.moe.losses import z_loss


def totals_of(num_tokens: int) -> BatchTotals:
    return BatchTotals(num_tokens, num_tokens, 1, 1)


def test_by_hand() -> None:
    """Four equal logits 0 have log-sum-exp log 4; the token of 1000 is padding."""
    logits_TE = torch.tensor([[0.0] * 4, [math.log(2)] * 4, [1000.0] * 4])
    loss = z_loss(logits_TE, totals_of(2), torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx((math.log(4) ** 2 + math.log(8) ** 2) / 2)


def test_shares_of_any_partition_sum_to_the_mean() -> None:
    logits_TE = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    valid_T = torch.arange(12) != 5
    totals = totals_of(11)
    parts = torch.randperm(12).split([1, 4, 7])
    shares = sum(z_loss(logits_TE[part], totals, valid_T[part]) for part in parts)
    mean = logits_TE[valid_T].logsumexp(-1).square().mean()
    torch.testing.assert_close(shares, mean, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits_TE)[0] for loss in (shares, mean)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_nothing_but_padding_is_zero() -> None:
    loss = z_loss(torch.ones(3, 4), totals_of(1), torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0
    assert z_loss(torch.ones(0, 4), totals_of(1)).item() == 0
