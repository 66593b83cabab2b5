"""Products that load by TMA, against those that compute addresses."""

import pytest
import torch
from on_device import DEVICE, load_by, poisoned  # first: it skips this file where Triton is missing
from test_experts import COUNTS, make, run

from dmoe.ops import expert_ffn

configs = pytest.importorskip("dmoe_kernels.configs")
gemm = pytest.importorskip("dmoe_kernels.grouped_gemm")
tma = pytest.importorskip("dmoe_kernels.tma")
dz = pytest.importorskip("dmoe_kernels.dz")
tiles = pytest.importorskip("dmoe_kernels.tiles")

if DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("TMA is of sm_90", allow_module_level=True)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_equals_the_products_by_address(monkeypatch, activation: str, counts: list[int]) -> None:
    """Tails of experts, of all rows and of columns; experts without rows; bit for bit."""
    inputs = make(counts, torch.float16, activation, 24, 40)

    def result(by_tma: bool) -> list[torch.Tensor]:
        load_by(monkeypatch, tma=by_tma)
        return run(expert_ffn, *inputs, activation, backend="triton")

    for got, want in zip(result(by_tma=True), result(by_tma=False), strict=True):
        assert torch.equal(got, want)


def test_rows_past_the_counts_meet_zeros() -> None:
    """A product that TMA loads reads on past the last expert, into memory that nobody wrote."""
    inputs = make([3, 0, 18], torch.float16, "swiglu", 16, 24)
    x, rows, weights, counts, _, w_down, dy = inputs
    index = torch.cat((rows.index_R, torch.zeros(80, dtype=torch.int64, device=DEVICE)))
    gates = torch.cat((weights, torch.ones(80, device=DEVICE)))
    z = torch.randn(len(index), 48).to(DEVICE, torch.float16)
    config = configs._INTERPRETED._replace(tma=True)
    if DEVICE.type == "cuda":
        config = next(c for c in configs.CANDIDATES["outer"] if c.tma)
    options = {"dtype": torch.float32, "config": config}
    with poisoned():
        dz_RH, a_RF, _ = dz.dz(dy, index, z, gates, counts, w_down, "swiglu")
        offsets = tiles.tile_rows(counts, len(index), 32).offsets
        dw_up = gemm.grouped_outer(dz_RH, x, index, offsets, gather_a=False, **options)
        dw_down = gemm.grouped_outer(dy, a_RF, index, offsets, gather_a=True, **options)
    assert dz_RH[-1].isnan().all()
    assert a_RF[-1].isnan().all()
    assert dw_up.isfinite().all()
    assert dw_down.isfinite().all()


@pytest.mark.parametrize(("size_k", "size_n"), [(24, 17), (20, 16)])
def test_widths_that_do_not_suit_are_refused(size_k: int, size_n: int) -> None:
    """Tuning passes over what raises this, and nothing else asks for it."""
    rows = torch.randn(4, size_k).to(DEVICE, torch.float16)
    w = torch.randn(1, size_k, size_n).to(DEVICE, torch.float16)
    counts = torch.tensor([4], device=DEVICE)
    assert not (tma.suits_tma(rows) and tma.suits_tma(w))
    config = configs._INTERPRETED._replace(tma=True)
    with pytest.raises(RuntimeError, match="TMA cannot read rows of"):
        gemm.grouped_gemm(rows, w, counts, transposed=False, num_rows=4, config=config)


def test_it_is_of_sm_90_alone() -> None:
    of = configs.candidates
    assert of("gemm", 2, 232_448, wgmma=True)[0].tma
    assert not of("gemm", 2, 232_448, wgmma=True, tma=False)[0].tma
    assert not any(config.tma for config in of("gemm", 2, 166_912, wgmma=False))
