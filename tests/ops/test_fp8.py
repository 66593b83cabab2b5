"""Products in eight bits: what the numbers become, and what the experts make of them, by loops."""

import itertools
import math

import pytest
import torch

from dmoe.ops import RowMap, expert_ffn
from dmoe.ops.fp8 import grouped_mm_fp8, round_rows, round_weights

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]]


def rounded_block(block: torch.Tensor) -> torch.Tensor:
    """Round numbers that share a scale, the least power of two with none above 448."""
    largest = block.abs().max().item()
    scale = 2.0 ** max(-126, math.ceil(math.log2(largest / 448))) if largest else 1.0
    return (block.double() / scale).to(torch.float8_e4m3fn).double() * scale


def rounded_by_hand(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Round blocks of some rows and 128 columns, one after the other."""
    result = torch.empty_like(x, dtype=torch.float64)
    for i, j in itertools.product(range(0, len(x), rows), range(0, x.shape[1], 128)):
        result[i : i + rows, j : j + 128] = rounded_block(x[i : i + rows, j : j + 128])
    return result


class _Rounded(torch.autograd.Function):
    """A product of rounded numbers, whose gradients are of numbers as they are but for dx."""

    @staticmethod
    def forward(ctx, x, w, rounds_dx):
        ctx.save_for_backward(x, w)
        ctx.rounds_dx = rounds_dx
        return rounded_by_hand(x, 1) @ rounded_by_hand(w, 128).t()

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        if ctx.rounds_dx:
            return rounded_by_hand(dy, 1) @ rounded_by_hand(w, 128), dy.t() @ x, None
        return dy @ w, dy.t() @ x, None


def ffn_by_hand(x, rows, weights, counts, w_up, w_down, *, activation):
    """Return what `expert_ffn` makes in eight bits, in float64; autograd for its gradients."""
    outputs = []
    for expert, index in enumerate(rows.index_R.split(counts.tolist())):
        hidden = _Rounded.apply(x[index], w_up[expert], True)
        gates = weights.split(counts.tolist())[expert]
        if activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * up
        else:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        outputs.append(_Rounded.apply(hidden * gates[:, None], w_down[expert], False))
    return torch.zeros_like(x).index_add(0, rows.index_R, torch.cat(outputs))


def make(counts, activation, dim=256, ffn_dim=128, seed=0):
    """Return x, the row map, gates, counts, both weights, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_rows = sum(counts)
    rows = RowMap.from_index(torch.randint(6, (num_rows,), generator=generator), 6)
    width = 2 * ffn_dim if activation == "swiglu" else ffn_dim
    return (
        normal(6, dim),
        rows,
        torch.rand(num_rows, generator=generator, dtype=torch.float64),
        torch.tensor(counts),
        normal(len(counts), width, dim) * dim**-0.5,
        normal(len(counts), dim, ffn_dim) * ffn_dim**-0.5,
    )


def run(fn, inputs, precision, **options):
    """Return output and gradients of x, gates and weights."""
    x, rows, weights, counts, w_up, w_down = inputs
    leaves = [t.to(precision).requires_grad_() for t in (x, w_up, w_down)]
    wide = torch.promote_types(precision, torch.float32)
    gates = weights.to(wide).requires_grad_()
    y = fn(leaves[0], rows, gates, counts, *leaves[1:], **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, [leaves[0], gates, *leaves[1:]], dy.to(precision))]


def test_each_block_has_the_least_power_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 384, generator=generator)
    x *= 10 ** torch.empty(256, 384).uniform_(-3, 3, generator=generator)
    x[0] = 0
    assert torch.equal(round_rows(x).double(), rounded_by_hand(x, 1))
    assert torch.equal(round_weights(x[None])[0].double(), rounded_by_hand(x, 128))
    # A matrix and its transpose become the same numbers, as dX needs them the other way round.
    assert torch.equal(round_weights(x.t()[None])[0], round_weights(x[None])[0].t())
    # Rounding again changes nothing: rows that were sent in eight bits stay as they are.
    assert torch.equal(round_rows(round_rows(x)), round_rows(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_that_of_the_rounded_numbers(dtype) -> None:
    x, _, _, counts, w_up, _ = make(COUNTS[0], "gelu")
    rows, w = x[[0, 1, 2, 3, 4, 5, 0, 1, 2]].to(dtype), w_up.to(dtype)
    got = grouped_mm_fp8(rows, w, counts)
    assert got.dtype == dtype
    parts = zip(rounded_by_hand(rows, 1).split(counts.tolist()), w, strict=True)
    want = torch.cat([part @ rounded_by_hand(m, 128).t() for part, m in parts])
    error = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert (got.double() - want).norm() <= error * want.norm()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_experts_equal_the_loop(activation, counts) -> None:
    """In float64 no sum is close enough to a boundary of e4m3 to fall on its other side."""
    inputs = make(counts, activation)
    got = run(expert_ffn, inputs, torch.float64, activation=activation, dtype="fp8")
    want = run(ffn_by_hand, inputs, torch.float64, activation=activation)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "loop", "auto"])
def test_close_to_products_that_are_not_rounded(backend, dtype) -> None:
    """e4m3 rounds both sides by 2.5% on average; the gates' gradients meet all of it."""
    inputs = make([40, 0, 33, 7], "swiglu")
    options = {"activation": "swiglu", "backend": backend}
    got = run(expert_ffn, inputs, dtype, dtype="fp8", **options)
    want = run(expert_ffn, inputs, torch.float64, **options)
    for a, b in zip(got, want, strict=True):
        assert 1e-3 < (a.double() - b).norm() / b.norm() < 0.12


def test_recomputing_changes_no_number() -> None:
    inputs = make([3, 0, 5, 1], "swiglu")
    options = {"activation": "swiglu", "dtype": "fp8"}
    want = run(expert_ffn, inputs, torch.float32, **options)
    got = run(expert_ffn, inputs, torch.float32, recompute=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("widths", [(64, 128), (128, 192)])
def test_other_widths_are_refused(widths) -> None:
    inputs = make([4], "gelu", *widths)
    with pytest.raises(ValueError, match="multiples of 128"):
        run(expert_ffn, inputs, torch.float32, activation="gelu", dtype="fp8")
