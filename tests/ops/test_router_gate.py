import pytest
import torch

from dmoe.ops.router_gate import router_gate, router_gate_loop


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_autograd(dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(4, 16, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    results = []
    for fn in (router_gate, router_gate_loop):
        logits = fn(x, w)
        dlogits = torch.ones_like(logits).cumsum(0)
        results.append([logits, *torch.autograd.grad(logits, [x, w], dlogits)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_logits_are_float32_for_a_bfloat16_model() -> None:
    x, w = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(3, 8)
    assert router_gate(x, w).dtype == torch.float32
