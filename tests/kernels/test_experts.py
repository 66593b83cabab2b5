"""The experts' kernels, through the door, against the loop twin: forward and every gradient."""

import pytest
import torch
from on_device import DEVICE, assert_close  # first: it skips this file where Triton is missing

from dmoe.ops import RowMap, expert_ffn, expert_ffn_loop

pytest.importorskip("dmoe_kernels.experts")

# Rounding to the type, and the sums of float32; the interpreter multiplies bfloat16 as float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Tiles have 32 rows under the interpreter: whole ones, tails above and below a half, empty experts.
COUNTS = [[3, 0, 33, 17], [0, 0, 53, 0], [0, 0, 0], [37], [1, 5, 2, 0, 32, 7, 1, 1]]


def make(counts: list[int], dtype: torch.dtype, activation: str, dim: int, ffn_dim: int):
    """Return x, the row map, gates, counts, both weights and a gradient of the output."""
    torch.manual_seed(0)
    num_sources, num_rows, num_experts = 13, sum(counts), len(counts)
    width = 2 * ffn_dim if activation == "swiglu" else ffn_dim
    rows = RowMap.from_index(torch.randint(num_sources, (num_rows,)), num_sources)
    return (
        torch.randn(num_sources, dim).to(DEVICE, dtype),
        RowMap(*(part.to(DEVICE) for part in rows)),
        torch.rand(num_rows).to(DEVICE),
        torch.tensor(counts).to(DEVICE),
        (torch.randn(num_experts, width, dim) * dim**-0.5).to(DEVICE, dtype),
        (torch.randn(num_experts, dim, ffn_dim) * ffn_dim**-0.5).to(DEVICE, dtype),
        torch.randn(num_sources, dim).to(DEVICE, dtype),
    )


def run(fn, x, rows, weights, counts, w_up, w_down, dy, activation, **options):
    """Return the output and the gradients of x, gates and weights."""
    leaves = [t.clone().requires_grad_() for t in (x, weights, w_up, w_down)]
    y = fn(leaves[0], rows, leaves[1], counts, *leaves[2:], activation=activation, **options)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)]


def expected(inputs, activation):
    """Return what the loop twin makes of the same numbers in float64."""
    wide = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs
    ]
    return run(expert_ffn_loop, *wide, activation)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_equals_the_loop(activation, dtype) -> None:
    inputs = make(COUNTS[0], dtype, activation, 24, 40)
    actual = run(expert_ffn, *inputs, activation, backend="triton")
    for got, want in zip(actual, expected(inputs, activation), strict=True):
        assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("counts", COUNTS[1:])
def test_any_load(counts) -> None:
    """One expert has all rows, none has any, there is one, there are many."""
    inputs = make(counts, torch.float32, "swiglu", 16, 16)
    actual = run(expert_ffn, *inputs, "swiglu", backend="triton")
    for got, want in zip(actual, expected(inputs, "swiglu"), strict=True):
        assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("dim", "ffn_dim"), [(16, 48), (40, 24), (8, 8), (33, 21)])
def test_any_width(dim, ffn_dim) -> None:
    """Widths that no block divides, smaller than a block, and odd."""
    inputs = make([3, 0, 18], torch.float32, "swiglu", dim, ffn_dim)
    actual = run(expert_ffn, *inputs, "swiglu", backend="triton")
    for got, want in zip(actual, expected(inputs, "swiglu"), strict=True):
        assert_close(got, want, TOLERANCE[torch.float32])


def test_weights_may_be_wider_than_rows() -> None:
    x, rows, weights, counts, w_up, w_down, dy = make([9, 4], torch.bfloat16, "swiglu", 16, 16)
    wide = (x, rows, weights, counts, w_up.float(), w_down.float(), dy)
    actual = run(expert_ffn, *wide, "swiglu", backend="triton")
    assert [t.dtype for t in actual] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for got, want in zip(actual, expected(wide, "swiglu"), strict=True):
        assert_close(got, want, TOLERANCE[torch.bfloat16])


def test_twice_gives_the_same_bits() -> None:
    inputs = make(COUNTS[0], torch.float16, "swiglu", 24, 40)
    first, second = (run(expert_ffn, *inputs, "swiglu", backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_past_the_counts_are_never_read() -> None:
    """The row map may be longer than the counts, so that the host need not know their sum."""
    inputs = make([3, 0, 18], torch.float32, "swiglu", 16, 24)
    x, rows, weights, counts, w_up, w_down, dy = inputs
    want = run(expert_ffn, *inputs, "swiglu", backend="triton")
    spare = torch.zeros(40, dtype=torch.int64, device=DEVICE)
    padded = RowMap(
        torch.cat((rows.index_R, spare)), torch.cat((rows.by_source_R, spare)), rows.offsets_N1
    )
    gates = torch.cat((weights, torch.full((40,), torch.nan, device=DEVICE)))
    got = run(expert_ffn, x, padded, gates, counts, w_up, w_down, dy, "swiglu", backend="triton")
    dweights = got.pop(2)
    assert torch.equal(dweights[:-40], want.pop(2))
    assert not dweights[-40:].any()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_saving_x_alone_and_adding_to_main_gradients() -> None:
    inputs = make([9, 0, 4], torch.float32, "swiglu", 16, 24)
    want = run(expert_ffn, *inputs, "swiglu", backend="triton")
    again = run(expert_ffn, *inputs, "swiglu", backend="triton", recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    sums = tuple(torch.randn_like(t) for t in want[3:])
    before = [t.clone() for t in sums]
    got = run(expert_ffn, *inputs, "swiglu", backend="triton", main_grads=sums)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
    assert got[3:] == [None, None]
    for total, old, new in zip(sums, before, want[3:], strict=True):
        assert_close(total, old + new, 1e-6)
