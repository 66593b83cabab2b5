"""The bag of single neurons against a loop, forward and gradients, in float64."""

import pytest
import torch
from torch import Tensor

from dmoe.ops import neuron_bag as bags
from dmoe.ops.neuron_bag import neuron_bag, neuron_bag_loop

TOKENS, SLOTS, EXPERTS, DIM = 9, 5, 7, 6


def inputs(ids: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(ids), DIM), (*ids.shape,), (EXPERTS, DIM), (EXPERTS, DIM)]
    return [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]


def ids(seed: int) -> Tensor:
    """Unused slots, a token without any, experts twice in a token, and one that nobody uses."""
    generator = torch.Generator().manual_seed(seed)
    ids_NK = torch.randint(-2, EXPERTS - 1, (TOKENS, SLOTS), generator=generator).clamp(min=-1)
    ids_NK[3] = -1
    ids_NK[4, :2] = 2
    return ids_NK


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("chunk", [4, 1 << 15])
def test_equals_the_loop(activation: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bags, "_CHUNK", chunk)
    for ids_NK in (ids(0), ids(1), torch.full((TOKENS, SLOTS), -1)):
        results = []
        for function in (neuron_bag, neuron_bag_loop):
            x, weights, w_in, w_out = leaves = inputs(ids_NK)
            y = function(x, ids_NK, weights, w_in, w_out, activation)
            (y * torch.arange(DIM)).sum().backward()
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
            results.append([y.detach(), *gradients])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    """relu(2) x 0.5 x (1, 0) and relu(-1), which is nothing."""
    x, w_in = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    w_out = torch.tensor([[1.0, 0.0], [9.0, 9.0]])
    y = neuron_bag(x, torch.tensor([[0, 1]]), torch.tensor([[0.5, 1.0]]), w_in, w_out, "relu")
    assert y.tolist() == [[1.0, 0.0]]


def test_no_tokens() -> None:
    x, weights, w_in, w_out = inputs(torch.zeros(0, SLOTS, dtype=torch.int64))
    y = neuron_bag(x, torch.zeros(0, SLOTS, dtype=torch.int64), weights, w_in, w_out, "gelu")
    y.sum().backward()
    assert y.shape == (0, DIM)
    assert not w_in.grad.any()


def test_narrow_tokens_get_narrow_results() -> None:
    x, weights, w_in, w_out = (t.detach().float() for t in inputs(ids(0)))
    y = neuron_bag(x.bfloat16(), ids(0), weights, w_in, w_out, "gelu")
    wide = neuron_bag(x.bfloat16().float(), ids(0), weights, w_in, w_out, "gelu")
    assert torch.equal(y, wide.bfloat16())
