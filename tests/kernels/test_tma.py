"""The grouped GEMM by TMA, in the interpreter, against the one that computes addresses."""

import pytest
import torch
from on_device import DEVICE, assert_close  # first: it skips this file where Triton is missing

configs = pytest.importorskip("dmoe_kernels.configs")
gemm = pytest.importorskip("dmoe_kernels.grouped_gemm")

BY_ADDRESS = configs.Config(32, 16, 16, 4, 1, 2)
BY_TMA = BY_ADDRESS._replace(tma=True)
if DEVICE.type == "cuda":
    BY_ADDRESS, BY_TMA = configs.CANDIDATES["gemm"][2], configs.CANDIDATES["gemm"][-1]
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("TMA is of sm_90", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 33, 17], [0, 0, 0], [37]])
def test_equals_the_gemm_by_address(counts, transposed, dtype) -> None:
    """Tails of experts, of all rows and of columns; an expert without rows."""
    size_k, size_n = 128, 40
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), size_k).to(DEVICE, dtype)
    shape = (size_n, size_k) if transposed else (size_k, size_n)
    w = torch.randn(len(counts), *shape).to(DEVICE, dtype)
    counts_E = torch.tensor(counts).to(DEVICE)
    got, want = (
        gemm.grouped_gemm(
            rows, w, counts_E, transposed=transposed, num_rows=len(rows), config=config
        )
        for config in (BY_TMA, BY_ADDRESS)
    )
    assert_close(got, want, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("size_k", "size_n"), [(24, 16), (16, 3)])
def test_widths_that_do_not_suit_are_refused(size_k: int, size_n: int) -> None:
    """Tuning passes over what raises this."""
    rows, w = torch.randn(4, size_k).to(DEVICE), torch.randn(1, size_k, size_n).to(DEVICE)
    counts = torch.tensor([4]).to(DEVICE)
    with pytest.raises(RuntimeError, match="do not suit TMA"):
        gemm.grouped_gemm(rows, w, counts, transposed=False, num_rows=4, config=BY_TMA)


def test_only_tuning_takes_it_and_only_on_sm_90() -> None:
    on_sm_90 = configs.candidates("gemm", 2, 232_448, wgmma=True)
    assert not on_sm_90[0].tma
    assert any(config.tma for config in on_sm_90)
    assert not any(config.tma for config in configs.candidates("gemm", 2, 166_912, wgmma=False))
