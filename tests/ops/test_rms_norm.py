import pytest
import torch

from dmoe.ops.rms_norm import rms_norm, rms_norm_torch


@pytest.mark.parametrize("shape", [(3, 5, 16), (7, 8), (2, 0, 4)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
)
def test_equals_torch(shape, dtype, weight_dtype, tolerance) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], dtype=torch.float64).to(weight_dtype).requires_grad_()
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    got = [y, *torch.autograd.grad(y, [x, weight], dy)]
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    twin = rms_norm_torch(*doubles, 1e-5)
    want = [twin, *torch.autograd.grad(twin, doubles, dy.double())]
    for actual, expected in zip(got, want, strict=True):
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()


def test_the_gradient_is_of_the_weight_that_was_used() -> None:
    """A float32 weight is rounded in the forward pass, so its last bits change no gradient."""
    torch.manual_seed(0)
    x, dy = (torch.randn(7, 16, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(16) + 1
    gradients = []
    for given in (weight, weight.bfloat16().float()):
        inputs = [x.clone().requires_grad_(), given.requires_grad_()]
        gradients.append(torch.autograd.grad(rms_norm(*inputs, 1e-5), inputs, dy))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_row_of_zeros_stays_zero_and_finite() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-5)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4))
    assert x.grad is not None
    assert x.grad.isfinite().all()
