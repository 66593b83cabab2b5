"""The grouped GEMM and its weight gradient alone, in every form, against the loops of torch."""

import pytest
import torch
from on_device import DEVICE, assert_close, twice  # first: it skips this file
from test_experts import COUNTS, TOLERANCE

from dmoe.ops.grouped_mm import grouped_mm_loop, grouped_outer_loop

configs = pytest.importorskip("dmoe_kernels.configs")
gemm = pytest.importorskip("dmoe_kernels.grouped_gemm")
tiles = pytest.importorskip("dmoe_kernels.tiles")

M, N, SOURCES = 24, 40, 13


def config_of(kernel: str, tma: bool) -> "configs.Config":
    """Return one that loads as asked, on the CPU or on the device."""
    if configs.INTERPRET.value:
        return configs._INTERPRETED._replace(tma=tma)
    found = configs._candidates_of(kernel, torch.float32, DEVICE, tma=True, gluon=False)
    if tma and not any(config.tma for config in found):
        pytest.skip("TMA is of sm_90")
    return next(config for config in found if config.tma == tma)


def rows_of(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return (R, M) rows, (13, N) sources, the source of each row, and the counts."""
    torch.manual_seed(0)
    rows, sources = torch.randn(sum(counts), M), torch.randn(SOURCES, N)
    index = torch.randint(SOURCES, (sum(counts),))
    return rows.to(dtype), sources.to(dtype), index, torch.tensor(counts)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tma", [False, True])
def test_product_equals_the_loop(tma: bool, transposed: bool, dtype: torch.dtype) -> None:
    rows, _, _, counts = rows_of(COUNTS[0], dtype)
    w = torch.randn(len(counts), rows.shape[1], 56).to(dtype)
    laid = w.transpose(1, 2).contiguous() if transposed else w
    options = {"num_rows": len(rows), "config": config_of("gemm", tma)}
    inputs = [t.to(DEVICE) for t in (rows, laid, counts)]
    (got,) = twice(lambda: [gemm.grouped_gemm(*inputs, transposed=transposed, **options)])
    assert_close(got, grouped_mm_loop(rows.double(), w.double(), counts), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gather_a", [False, True])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_weight_gradient_equals_the_loop(adds, tma, gather_a, dtype) -> None:
    """New, in the rows' dtype, or added to float32 sums; zero for an expert without rows."""
    rows, sources, index, counts = rows_of(COUNTS[0], dtype)
    a, b = (sources, rows) if gather_a else (rows, sources)
    before = torch.randn(len(counts), a.shape[1], b.shape[1]) if adds else None
    a_, b_, index_, counts_ = (t.to(DEVICE) for t in (a, b, index, counts))
    config = config_of("outer_add" if adds else "outer", tma)
    options = {"gather_a": gather_a, "dtype": dtype, "config": config}

    def compute() -> list[torch.Tensor]:
        offsets = tiles.tile_rows(counts_, len(rows), 32).offsets
        out = before.to(DEVICE, copy=True) if adds else None
        return [gemm.grouped_outer(a_, b_, index_, offsets, out=out, **options)]

    (got,) = twice(compute)
    pair = (a[index], b) if gather_a else (a, b[index])
    want = grouped_outer_loop(*(t.double() for t in pair), counts)
    assert got.dtype == (torch.float32 if adds else dtype)
    assert_close(got.cpu() - before if adds else got, want, TOLERANCE[dtype])
    if not adds:
        assert not got[1].any()
