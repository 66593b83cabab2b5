"""Rows on the wire: what is sent, how exactly it comes back, and which inputs are at the edge."""

import math

import pytest
import torch

from dmoe.ops import RowMap
from dmoe.ops.wire import BLOCK, E4M3_MAX, dequantize_rows, quantize_rows, wire_width


def rows_of(num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of very different sizes, a block of zeros among them."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(num_rows, dim, generator=generator)
    x = x * 10 ** torch.empty(num_rows, 1).uniform_(-6, 4, generator=generator)
    x[:1, :BLOCK] = 0
    return x.to(dtype)


def quantize_loop(x_ND: torch.Tensor) -> torch.Tensor:
    """Define what is sent, a block at a time."""
    wire = torch.zeros(len(x_ND), wire_width(x_ND.shape[1]), dtype=torch.uint8)
    dim = x_ND.shape[1]
    for out, x in zip(wire, x_ND.float(), strict=True):
        for block, numbers in enumerate(x.split(BLOCK)):
            exponent = -126
            while numbers.abs().max().item() > E4M3_MAX * 2.0**exponent:
                exponent += 1
            scaled = numbers * 2.0**-exponent
            place = block * BLOCK
            out[place : place + len(numbers)] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
            out[dim + block] = exponent + 127
    return wire


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 16, 128, 200, 384])
def test_equals_the_loop(dim: int, dtype: torch.dtype) -> None:
    x = rows_of(7, dim).clamp(-6e4, 6e4).to(dtype)
    wire = quantize_rows(x)
    assert wire.dtype == torch.uint8
    assert torch.equal(wire, quantize_loop(x))


@pytest.mark.parametrize("dim", [1, 128, 200, 2048])
def test_a_byte_a_number_and_a_byte_a_block(dim: int) -> None:
    width = wire_width(dim)
    assert width % 16 == 0
    assert 0 <= width - (dim + math.ceil(dim / BLOCK)) < 16
    assert quantize_rows(torch.ones(3, dim)).shape == (3, width)


def test_comes_back_to_a_sixteenth_and_small_numbers_to_a_share_of_the_largest() -> None:
    x = rows_of(50, 300)
    back = dequantize_rows(quantize_rows(x), 300, torch.float32)
    largest = x.abs().amax(1, keepdim=True)
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, largest * 2.0**-17)).all()
    assert torch.equal(back[0, :BLOCK], torch.zeros(BLOCK))


def test_numbers_of_the_format_come_back_as_they_were() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = every[every.isfinite()][None]  # -448 to 448, in two blocks of one scale each
    assert x.shape == (1, 254)
    assert torch.equal(dequantize_rows(quantize_rows(x), 254, torch.float32), x)


def test_rows_are_sent_in_the_order_of_the_map() -> None:
    x = rows_of(4, 32)
    rows = RowMap.from_index(torch.tensor([3, 0, 3, 1]), 4)
    assert torch.equal(quantize_rows(x, rows), quantize_rows(x)[[3, 0, 3, 1]])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.ones(2, 150)
    x[1, 3] = bad
    back = dequantize_rows(quantize_rows(x), 150, torch.bfloat16)
    assert back[0].isfinite().all()
    assert not back[1, 3].isfinite()


def test_the_largest_of_float16_does_not_overflow() -> None:
    x = torch.full((1, 3), 65504.0, dtype=torch.float16)
    assert torch.equal(dequantize_rows(quantize_rows(x), 3, torch.float16), x)


def test_no_rows() -> None:
    assert dequantize_rows(quantize_rows(torch.ones(0, 40)), 40, torch.float32).shape == (0, 40)
