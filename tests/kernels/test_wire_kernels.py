"""Rows on the wire by the kernels: the same bytes as torch's, the same numbers back."""

import pytest
import torch
from on_device import DEVICE, twice  # first: it skips this file where Triton is missing

from dmoe.ops import RowMap
from dmoe.ops.wire import dequantize_rows, quantize_rows

pytest.importorskip("dmoe_kernels.wire")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_of(num_rows: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(num_rows, dim, generator=generator)
    x = x * 10 ** torch.empty(num_rows, dim).uniform_(-4, 4, generator=generator)
    x[:1] = 0
    return x.clamp(-6e4, 6e4).to(dtype)


# Several blocks and a tail, more blocks than a program takes, one number, no rows.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "dim"), [(5, 300), (2, 17 * 128 + 8), (3, 1), (0, 32)])
def test_the_same_bytes_and_the_same_numbers(num_rows, dim, dtype) -> None:
    x = rows_of(num_rows, dim, dtype)
    want = quantize_rows(x)
    (got,) = twice(lambda: [quantize_rows(x.to(DEVICE), by_triton=True)])
    assert torch.equal(got.cpu(), want)
    (back,) = twice(lambda: [dequantize_rows(got, dim, dtype, by_triton=True)])
    assert torch.equal(back.cpu(), dequantize_rows(want, dim, dtype))


def test_every_number_of_the_format_and_between() -> None:
    every = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:-1]
    halves = (every[1:] + every[:-1]) / 2  # exactly between: to the even one
    x = torch.cat([every, -halves, halves, torch.tensor([2.0**-12, 448.0])])[None]
    x = x.repeat_interleave(2, 0)
    assert torch.equal(quantize_rows(x.to(DEVICE), by_triton=True).cpu(), quantize_rows(x))


def test_each_source_goes_to_all_its_rows() -> None:
    x = rows_of(6, 200, torch.float32)
    rows = RowMap.from_index(torch.tensor([3, 0, 3, 1, 5, 3]), 6)
    on_device = RowMap(*(t.to(DEVICE) for t in rows))
    (got,) = twice(lambda: [quantize_rows(x.to(DEVICE), on_device, by_triton=True)])
    assert torch.equal(got.cpu(), quantize_rows(x, rows))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.ones(2, 150, device=DEVICE)
    x[1, 3] = bad
    wire = quantize_rows(x, by_triton=True)
    back = dequantize_rows(wire, 150, torch.float32, by_triton=True)
    assert back[0].isfinite().all()
    assert not back[1, 3].isfinite()
