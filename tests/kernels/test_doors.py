"""Tensors that lie in memory in another way: kernels compute addresses, and the doors see to it."""

import pytest
import torch
from on_device import DEVICE, assert_close  # first: it skips this file where Triton is missing
from test_experts import expected, make

from dmoe.ops import RowMap, expert_ffn, gather, gather_sum
from dmoe.ops.routing import select_experts, select_experts_torch
from dmoe.ops.triton_masks import masked_activation_by_triton
from dmoe.ops.wire import dequantize_rows, quantize_rows

pytest.importorskip("dmoe_kernels.experts")
masks = pytest.importorskip("dmoe.ops.mean_mask")


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, each followed by others that would be wrong."""
    padded = torch.stack((tensor, tensor.flip(0) if tensor.ndim else tensor), -1)
    return padded[..., 0]


def strided_map(rows: RowMap) -> RowMap:
    return RowMap(*(strided(part) for part in rows))


@pytest.mark.parametrize("which", ["x", "rows", "weights", "counts", "w_up", "w_down", "dy"])
def test_experts(which: str) -> None:
    inputs = make([3, 0, 33, 17], torch.float32, "swiglu", 24, 40)
    place = ["x", "rows", "weights", "counts", "w_up", "w_down", "dy"].index(which)
    changed = list(inputs)
    changed[place] = strided_map(inputs[1]) if which == "rows" else strided(inputs[place])
    x, rows, weights, counts, w_up, w_down, dy = changed
    # No clones, which would lie in order.
    leaves = [t.detach().requires_grad_() for t in (x, weights, w_up, w_down)]
    x, weights, *both = leaves
    y = expert_ffn(x, rows, weights, counts, *both, activation="swiglu", backend="triton")
    actual = [y, *torch.autograd.grad(y, leaves, dy)]
    for got, want in zip(actual, expected(inputs, "swiglu"), strict=True):
        assert_close(got, want, 2e-6)


def test_gates_that_are_one_number() -> None:
    x, rows, weights, *rest = make([3, 0, 33, 17], torch.float32, "swiglu", 24, 40)
    one = weights[:1]
    got = expert_ffn(x, rows, one.expand(53), *rest[:3], activation="swiglu", backend="triton")
    want = expert_ffn(x, rows, one.repeat(53), *rest[:3], activation="swiglu", backend="triton")
    assert torch.equal(got, want)


def test_the_choice_of_experts() -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(37, 8), torch.randn(8)
    k, valid = torch.randint(1, 4, (37,)), torch.rand(37) < 0.7
    plain = [t.to(DEVICE) for t in (logits, bias, k, valid)]
    changed = [strided(t) for t in plain]
    got = select_experts(changed[0], changed[1], changed[2], 3, changed[3], "sigmoid")
    want = select_experts_torch(logits, bias, k, 3, valid, "sigmoid")
    assert torch.equal(got.cpu(), want)
    same = torch.tensor([2]).to(DEVICE)
    got = select_experts(plain[0], plain[1], same.expand(37), 3, None, "softmax")
    assert torch.equal(got.cpu(), select_experts_torch(logits, bias, 2, 3, None, "softmax"))


def test_rows_that_are_sent() -> None:
    torch.manual_seed(0)
    x = torch.randn(13, 200).to(DEVICE)
    rows = RowMap.from_index(torch.randint(13, (31,)), 13)
    rows = RowMap(*(part.to(DEVICE) for part in rows))
    wire = quantize_rows(strided(x), strided_map(rows), by_triton=True)
    assert torch.equal(wire, quantize_rows(x, rows))
    got = dequantize_rows(strided(wire), 200, torch.float32, by_triton=True)
    assert torch.equal(got, dequantize_rows(wire, 200, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_summed(dtype: torch.dtype) -> None:
    """For a dispatcher: what it sends and what comes back, and the gradients of both."""
    torch.manual_seed(0)
    rows = RowMap.from_index(torch.tensor([3, 0, 3, 3, 1, 3, 3, 3, 3, 3, 3, 3]), 5)
    x, dy = torch.randn(5, 200), torch.randn(12, 200)
    for op, value, gradient in ((gather, x, dy), (gather_sum, dy, x)):
        results = []
        for by_triton in (False, True):
            mapped = RowMap(*(part.to(DEVICE) for part in rows))
            wide = torch.float64 if not by_triton else dtype
            leaf = value.to(dtype).to(DEVICE, wide).requires_grad_()
            out = op(leaf, strided_map(mapped) if by_triton else mapped, by_triton=by_triton)
            out.backward(strided(gradient.to(dtype).to(DEVICE, wide)))
            results.append((out, leaf.grad))
        for got, want in zip(*reversed(results), strict=True):
            assert got.dtype == dtype
            assert_close(got, want, 4e-3 if dtype == torch.bfloat16 else 1e-6)


def test_masks_of_neurons() -> None:
    torch.manual_seed(0)
    hidden, z, w = torch.randn(9, 32), torch.randn(9, 2, 4), torch.randn(32, 4)
    valid = torch.rand(9) < 0.6
    tensors = [t.to(DEVICE) for t in (hidden, z, w, valid)]
    rule = masks.MaskRule(hard=False, scale=1.0)

    def result(hidden, z, w, valid) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (hidden, z, w)]
        a, bits = masked_activation_by_triton(
            *leaves, 5, rule=rule, activation="gelu", decide=lambda f: f(), valid_T=valid
        )
        return [a, bits, *torch.autograd.grad(a.square().sum(), leaves)]

    for got, want in zip(result(*map(strided, tensors)), result(*tensors), strict=True):
        assert torch.equal(got, want)
