"""The weighted activation and its gradient: equal to autograd in float64, in pieces too."""

import pytest
import torch
from torch import Tensor

import dmoe.ops.activation as activation_module
from dmoe.ops.activation import (
    Activation,
    activate,
    activate_weighted,
    activate_weighted_backward,
)

ROWS, FFN_DIM = 37, 6
ACTIVATIONS = ["swiglu", "gelu", "relu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _inputs(activation: Activation, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    width = 2 * FFN_DIM if activation == "swiglu" else FFN_DIM
    z, da = torch.randn(ROWS, width).to(dtype), torch.randn(ROWS, FFN_DIM).to(dtype)
    return z, da, torch.rand(ROWS, dtype=torch.promote_types(dtype, torch.float32))


def _by_autograd(
    z: Tensor, da: Tensor, weights: Tensor, activation: Activation
) -> tuple[Tensor, ...]:
    z, weights = (t.detach().double().requires_grad_() for t in (z, weights))
    a = activate(z, activation) * weights[:, None]
    return a, *torch.autograd.grad(a, (z, weights), da.double())


@pytest.mark.parametrize("piece", [1, 5 * 2 * FFN_DIM, 2**18])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_autograd_in_float64(
    activation: Activation, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_module, "_PIECE", piece)
    z, da, weights = _inputs(activation, dtype)
    a, dz, dweights = _by_autograd(z, da, weights, activation)
    # What is narrow is rounded once, after products in float32.
    wide = (
        {"rtol": 1e-13, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )
    half_a_place = {"rtol": torch.finfo(dtype).eps / 2 * 1.001, "atol": 1e-6}
    rounded = half_a_place if dtype.itemsize < 4 else wide
    forward = activate_weighted(z, weights, activation)
    again, dz_found, dweights_found = activate_weighted_backward(z, da, weights, activation)
    assert (forward.dtype, dz_found.dtype, dweights_found.dtype) == (dtype, dtype, weights.dtype)
    assert torch.equal(forward, again)
    for found, want, tolerance in (
        (forward, a, rounded),
        (dz_found, dz, rounded),
        (dweights_found, dweights, wide),
    ):
        torch.testing.assert_close(found.double(), want, **tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_rows(activation: Activation) -> None:
    z, da, weights = (t[:0] for t in _inputs(activation, torch.bfloat16))
    assert activate_weighted(z, weights, activation).shape == (0, FFN_DIM)
    shapes = [t.shape for t in activate_weighted_backward(z, da, weights, activation)]
    assert shapes == [da.shape, z.shape, weights.shape]
