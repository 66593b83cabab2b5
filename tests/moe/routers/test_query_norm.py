"""Batch norm of queries against torch's, over valid tokens alone, and its running moments."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers.query_norm import QueryBatchNorm, moments

TOKENS, FEATURES = 12, 5
TRAINING = MoEContext(seq_len=TOKENS, totals=BatchTotals(TOKENS, TOKENS, 1, 1))
INFERENCE = MoEContext(seq_len=TOKENS)


def build() -> QueryBatchNorm:
    norm = QueryBatchNorm(FEATURES).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    return norm


def queries(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shift, scale = torch.randn(2, FEATURES, generator=generator)
    return (shift + scale * torch.randn(TOKENS, FEATURES, generator=generator)).double()


@pytest.mark.parametrize("padded", [False, True])
def test_equals_that_of_torch_over_the_valid_tokens(padded: bool) -> None:
    valid_T = torch.arange(TOKENS) % 3 > 0 if padded else torch.ones(TOKENS, dtype=torch.bool)
    context = dataclasses.replace(TRAINING, valid_T=valid_T if padded else None)
    norm, twin = build(), nn.BatchNorm1d(FEATURES).double()
    twin.load_state_dict(dict(norm.named_parameters()), strict=False)
    results = []
    for module, forward in (
        (norm, lambda q: norm(q, context)[valid_T]),
        (twin, lambda q: twin(q[valid_T])),
    ):
        query_TF = queries().requires_grad_()
        y_RF = forward(query_TF)
        y_RF.pow(3).sum().backward()
        results.append([y_RF, query_TF.grad, module.weight.grad, module.bias.grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_running_moments_by_hand() -> None:
    """After two steps those of the second weigh 1 and those of the first 0.9, of 1.9."""
    norm = build()
    steps = [queries(1), 3 * queries(2)]
    for query_TF in steps:
        sums = moments(query_TF, TRAINING)
        norm.end_step({name: sum_F / TOKENS for name, sum_F in sums.items()})
    first, second = steps
    mean_F = (0.9 * first.mean(0) + second.mean(0)) / 1.9
    square_F = (0.9 * first.square().mean(0) + second.square().mean(0)) / 1.9
    deviation_F = (square_F - mean_F.square() + 1e-5).sqrt()
    fresh = queries(3)
    expected = norm.weight * (fresh - mean_F) / deviation_F + norm.bias
    torch.testing.assert_close(norm(fresh, INFERENCE), expected)
    torch.testing.assert_close(norm(fresh[:1], INFERENCE), expected[:1])
    assert not torch.allclose(norm(fresh, TRAINING), expected)


def test_a_forward_pass_moves_nothing() -> None:
    """So recomputation cannot move moments twice; before the first step the batch's own count."""
    norm = build()
    trained, inferred = (norm(queries(), context) for context in (TRAINING, INFERENCE))
    assert not any(buffer.any() for buffer in norm.buffers())
    torch.testing.assert_close(trained, inferred)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_but_padding_gives_numbers(num_tokens: int) -> None:
    norm, query_TF = build(), queries()[:num_tokens].requires_grad_()
    none_T = torch.zeros(num_tokens, dtype=torch.bool)
    context = dataclasses.replace(TRAINING, valid_T=none_T)
    (norm(query_TF, context) * none_T[:, None]).sum().backward()
    for tensor in (query_TF, *norm.parameters()):
        assert not tensor.grad.any()
    assert not any(sum_F.any() for sum_F in moments(query_TF, context).values())
