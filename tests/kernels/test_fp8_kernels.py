"""Products of experts in eight bits by the kernels, against those that torch defines."""

import pytest
import torch
from on_device import DEVICE, assert_close, poisoned, twice  # first: it skips this file
from test_experts import COUNTS, make, run

from dmoe.ops import RowMap, expert_ffn
from dmoe.ops.fp8 import round_rows, round_weights

fp8 = pytest.importorskip("dmoe_kernels.fp8")
configs = pytest.importorskip("dmoe_kernels.configs")
gemm = pytest.importorskip("dmoe_kernels.fp8_gemm")

if DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("these kernels are for tensor cores of sm_90", allow_module_level=True)

# Sums that differ in their last bits are rounded to another e4m3 number now and then; tensor cores
# keep fewer bits of a sum, and in bfloat16 torch rounds within the activation.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
if DEVICE.type == "cuda":
    TOLERANCE[torch.float32] = 1e-2
slow = pytest.mark.slow


def values(quantized: fp8.Quantized) -> torch.Tensor:
    """Return what rows or matrices in eight bits stand for."""
    scales = quantized.scales.repeat_interleave(128, -1)
    if scales.ndim == 3:
        scales = scales.repeat_interleave(128, 1)
    return quantized.numbers.float() * scales


def compare(inputs, activation, dtype, **options) -> None:
    """Run the kernels and torch on the same numbers."""
    options |= {"activation": activation, "dtype": "fp8"}
    got, want = (run(expert_ffn, *inputs, backend=b, **options) for b in ("triton", "loop"))
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_numbers(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 256, 384, generator=generator)
    x *= 10 ** torch.empty(3, 256, 384).uniform_(-4, 4, generator=generator)
    x[0, :130, :200] = 0
    x = x.clamp(-6e4, 6e4).to(DEVICE, dtype)
    assert torch.equal(values(fp8.quantize_rows(x[0])), round_rows(x[0]))
    want = round_weights(x)
    assert torch.equal(values(fp8.quantize_weights(x)), want)
    turned = values(fp8.quantize_weights(x, transposed=True))
    assert torch.equal(turned, want.transpose(1, 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.ones(128, 256, device=DEVICE)
    x[1, 3] = bad
    rows, matrix = values(fp8.quantize_rows(x)), values(fp8.quantize_weights(x[None]))[0]
    assert rows[0].isfinite().all()
    assert not rows[1, 3].isfinite()
    assert not matrix[1, 3].isfinite()


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        ("swiglu", torch.float32),
        ("gelu", torch.bfloat16),
        ("relu", torch.float16),
        pytest.param("swiglu", torch.float16, marks=slow),
        pytest.param("gelu", torch.float32, marks=slow),
        pytest.param("relu", torch.bfloat16, marks=slow),
    ],
)
def test_equals_torch(activation, dtype) -> None:
    compare(make(COUNTS[0], dtype, activation, 128, 128), activation, dtype)


@pytest.mark.parametrize(
    "counts", [COUNTS[2], COUNTS[4], *(pytest.param(c, marks=slow) for c in (COUNTS[1], COUNTS[3]))]
)
def test_any_load(counts) -> None:
    """None has any row, there are many experts, one has all, there is one."""
    inputs = make(counts, torch.float32, "swiglu", 128, 128)
    compare(inputs, "swiglu", torch.float32)


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "activation"),
    [
        (384, 128, "gelu"),
        pytest.param(128, 384, "swiglu", marks=slow),
        pytest.param(256, 384, "relu", marks=slow),
        pytest.param(384, 256, "swiglu", marks=slow),
    ],
)
def test_any_number_of_blocks(dim, ffn_dim, activation) -> None:
    """Tiles have two blocks of columns, of which the second may not be there."""
    inputs = make([3, 0, 18], torch.float32, activation, dim, ffn_dim)
    compare(inputs, activation, torch.float32)


@pytest.mark.parametrize("size_n", [128, 384])
def test_products_at_once_or_in_turn_are_the_same(size_n) -> None:
    torch.manual_seed(0)
    rows = fp8.quantize_rows(torch.randn(53, 256).to(DEVICE))
    matrices = fp8.quantize_weights(torch.randn(4, size_n, 256).to(DEVICE))
    counts = torch.tensor(COUNTS[0]).to(DEVICE)
    config = configs._INTERPRETED
    if DEVICE.type == "cuda":
        config = configs.CANDIDATES["gemm_fp8"][0]
    at_once, in_turn = (
        gemm.grouped_gemm(
            rows, matrices, counts, dtype=torch.float32, config=config._replace(block_n=block_n)
        )
        for block_n in (256, 128)
    )
    assert torch.equal(at_once, in_turn)


def test_weights_may_be_wider_than_rows() -> None:
    x, rows, weights, counts, w_up, w_down, dy = make([9, 4], torch.bfloat16, "swiglu", 128, 128)
    wide = (x, rows, weights, counts, w_up.float(), w_down.float(), dy)
    compare(wide, "swiglu", torch.bfloat16)


def test_recomputing_and_twice_give_the_same_bits() -> None:
    inputs = make([9, 0, 4], torch.bfloat16, "swiglu", 128, 128)
    options = {"activation": "swiglu", "backend": "triton", "dtype": "fp8"}
    first = twice(lambda: run(expert_ffn, *inputs, **options))
    again = run(expert_ffn, *inputs, **options, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_past_the_counts_are_never_read() -> None:
    """The row map may be longer than the counts; what is in no product may be anything."""
    inputs = make([3, 0, 18], torch.float32, "swiglu", 128, 128)
    x, rows, weights, counts, w_up, w_down, dy = inputs
    options = {"activation": "swiglu", "backend": "triton", "dtype": "fp8"}
    want = run(expert_ffn, *inputs, **options)
    spare = torch.zeros(40, dtype=torch.int64, device=DEVICE)
    padded = RowMap(
        torch.cat((rows.index_R, spare)), torch.cat((rows.by_source_R, spare)), rows.offsets_N1
    )
    gates = torch.cat((weights, torch.full((40,), torch.nan, device=DEVICE)))
    with poisoned():
        got = run(expert_ffn, x, padded, gates, counts, w_up, w_down, dy, **options)
    dweights = got.pop(2)
    assert_close(dweights[:-40], want.pop(2), 1e-6)  # torch sums its parts in another order
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
