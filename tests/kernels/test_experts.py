"""The experts' kernels, through the door, against the loop twin: forward and every gradient."""

import pytest
import torch
from on_device import DEVICE, assert_close, load_by, poisoned, twice  # first: it skips this file

from dmoe.ops import RowMap, expert_ffn, expert_ffn_loop

up = pytest.importorskip("dmoe_kernels.up")
dz = pytest.importorskip("dmoe_kernels.dz")
grouped_gemm = pytest.importorskip("dmoe_kernels.grouped_gemm")

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


class _Told:
    """In place of a kernel: launches it, and keeps what it is told of its widths."""

    def __init__(self, kernel, told: list[bool]) -> None:
        self.kernel, self.told = kernel, told

    def __getitem__(self, grid):
        def launch(*args, **options) -> None:
            self.told.append(options["EIGHTS"])
            self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "eights"), [(24, 48, True), (48, 40, True), (48, 16, False), (24, 21, False)]
)
def test_kernels_are_told_of_widths_that_8_divides(monkeypatch, dim, ffn_dim, eights) -> None:
    """Results are right without, but then a GPU loads number by number, and registers spill."""
    told: dict[str, list[bool]] = {"up": [], "gemm": [], "outer": [], "dz": []}
    modules = {"up": up, "gemm": grouped_gemm, "outer": grouped_gemm, "dz": dz}
    for name, module in modules.items():
        kernel = f"{name}_kernel"
        monkeypatch.setattr(module, kernel, _Told(getattr(module, kernel), told[name]))
    inputs = make([3, 0, 18], torch.float32, "gelu", dim, ffn_dim)
    run(expert_ffn, *inputs, "gelu", backend="triton")
    assert told == {"up": [eights], "gemm": [eights] * 2, "outer": [eights] * 2, "dz": [eights]}


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
    twice(lambda: run(expert_ffn, *inputs, "swiglu", backend="triton"))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    ("activation", "dtype", "recompute"),
    [("swiglu", torch.float32, False), ("gelu", torch.float16, True)],
)
def test_rows_past_the_counts_are_never_read(
    monkeypatch, activation, dtype, recompute, tma
) -> None:
    """The row map may be longer than the counts, so that the host need not know their sum.

    Spare rows are of a source that is NaN, have gates that are, and meet memory that is.
    """
    load_by(monkeypatch, tma=tma)
    x, rows, weights, counts, w_up, w_down, dy = make([3, 0, 18], dtype, activation, 16, 24)
    options = {"activation": activation, "backend": "triton", "recompute": recompute}
    want = run(expert_ffn, x, rows, weights, counts, w_up, w_down, dy, **options)
    spare = torch.full((80,), len(x), device=DEVICE)
    nan = torch.full_like(x[:1], torch.nan)
    padded = RowMap(
        torch.cat((rows.index_R, spare)),
        torch.cat((rows.by_source_R, torch.arange(21, 101, device=DEVICE))),
        torch.cat((rows.offsets_N1, rows.offsets_N1[-1:])),
    )
    gates = torch.cat((weights, torch.full((80,), torch.nan, device=DEVICE)))
    wide = (torch.cat((x, nan)), padded, gates, counts, w_up, w_down, torch.cat((dy, nan)))
    with poisoned():
        y, dx, dweights, *dw = run(expert_ffn, *wide, **options)
    assert not any(t.any() for t in (y[-1], dx[-1], dweights[-80:]))
    for got, expect in zip((y[:-1], dx[:-1], dweights[:-80], *dw), want, strict=True):
        assert torch.equal(got, expect)


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


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_micro_batches_add_to_float32_sums(monkeypatch, dtype: torch.dtype, tma: bool) -> None:
    """Two of them, to sums that are not zero; what is added is not rounded to the rows' dtype."""
    load_by(monkeypatch, tma=tma)
    batches = [make(counts, dtype, "swiglu", 24, 40) for counts in ([3, 0, 33], [17, 5, 0])]
    w_up, w_down = batches[0][4:6]
    start = [torch.randn(w.shape, device=DEVICE) for w in (w_up, w_down)]

    def by_kernels() -> list[torch.Tensor]:
        sums = tuple(t.clone() for t in start)
        for x, rows, weights, counts, _, _, dy in batches:
            inputs = (x, rows, weights, counts, w_up, w_down, dy)
            run(expert_ffn, *inputs, "swiglu", backend="triton", main_grads=sums)
        return list(sums)

    want = [t.double() for t in start]
    for x, rows, weights, counts, _, _, dy in batches:
        inputs = (x, rows, weights, counts, w_up, w_down, dy)
        for total, gradient in zip(want, expected(inputs, "swiglu")[3:], strict=True):
            total += gradient
    for got, total, old in zip(twice(by_kernels), want, start, strict=True):
        assert got.dtype == torch.float32
        assert_close(got - old, total - old, TOLERANCE[dtype])


# A difference over 2 eps of float32 outputs of about 1 is off by about 1e-7 / eps, and by eps^2.
DIFFERENCES = {"eps": 1e-2, "atol": 2e-3, "rtol": 2e-3}


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # that they are not float64
@pytest.mark.parametrize(("activation", "ffn_dim"), [("swiglu", 1), ("gelu", 2)])
def test_gradients_are_those_of_differences(activation: str, ffn_dim: int) -> None:
    x, _, weights, counts, w_up, w_down, _ = make([2, 0, 1], torch.float32, activation, 2, ffn_dim)
    rows = RowMap.from_index(torch.tensor([2, 0, 2]), 3)
    on_device = RowMap(*(part.to(DEVICE) for part in rows))

    def ffn(x, weights, w_up, w_down):
        options = {"activation": activation, "backend": "triton"}
        return expert_ffn(x, on_device, weights, counts, w_up, w_down, **options)

    leaves = [t.requires_grad_() for t in (x[:3].clone(), weights, w_up, w_down)]
    assert torch.autograd.gradcheck(ffn, leaves, **DIFFERENCES)


def test_frozen_experts_pass_gradients_and_cost_no_product(monkeypatch) -> None:
    x, rows, weights, counts, w_up, w_down, dy = make(COUNTS[0], torch.float16, "swiglu", 24, 40)
    results = []
    for frozen in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        both = [t.clone().requires_grad_(not frozen) for t in (w_up, w_down)]
        y = expert_ffn(
            leaves[0], rows, leaves[1], counts, *both, activation="swiglu", backend="triton"
        )
        y.backward(dy)
        assert all((w.grad is None) == frozen for w in both)
        results.append([leaf.grad for leaf in leaves])
        monkeypatch.delattr("dmoe_kernels.experts.grouped_outer", raising=False)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
