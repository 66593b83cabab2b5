"""The forms in Gluon against those in Triton, where they run: on sm_90, with Triton 3.6."""

import pytest
import torch
from on_device import DEVICE  # first: it skips this file where Triton is missing
from test_experts import run

from dmoe.ops import RowMap, expert_ffn

configs = pytest.importorskip("dmoe_kernels.configs")
common = pytest.importorskip("dmoe_kernels.gluon_common")
gluon_up = pytest.importorskip("dmoe_kernels.gluon_up")

runs = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9 or not common.HAS_GLUON,
    reason="Gluon's kernels run on sm_90 with Triton 3.6",
)
COUNTS = ([1], [0, 1, 128, 129, 300], [64, 65, 0, 63], [0, 0, 0], [700, 0, 1, 2000, 127, 255, 257])


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS)
def test_equals_triton(monkeypatch, counts: list[int], dtype: torch.dtype) -> None:
    """Bit for bit; the last five rows belong to no source."""
    torch.manual_seed(0)
    dim, ffn_dim, sources, num_rows = 512, 256, 37, sum(counts)
    rows = RowMap.from_index(torch.randint(sources, (num_rows,)), sources)
    spare = torch.zeros(5, dtype=torch.int64)
    padded = (torch.cat((rows.index_R, spare)), torch.cat((rows.by_source_R, spare)))
    inputs = (
        torch.randn(sources, dim).to(DEVICE, dtype),
        RowMap(*(part.to(DEVICE) for part in (*padded, rows.offsets_N1))),
        torch.rand(num_rows + 5).to(DEVICE),
        torch.tensor(counts).to(DEVICE),
        (torch.randn(len(counts), 2 * ffn_dim, dim) * dim**-0.5).to(DEVICE, dtype),
        (torch.randn(len(counts), dim, ffn_dim) * ffn_dim**-0.5).to(DEVICE, dtype),
        torch.randn(sources, dim).to(DEVICE, dtype),
    )

    def result(in_gluon: bool) -> list[torch.Tensor]:
        def choose(kernel, form, dtype, shape, device, run, *, tma=False, gluon=False, even_k=True):
            fitting = configs._candidates_of(kernel, dtype, device, tma=tma, gluon=gluon)
            return next(c for c in fitting if c.gluon == (in_gluon and gluon))

        for module in ("up", "grouped_gemm"):
            monkeypatch.setattr(f"dmoe_kernels.{module}.choose", choose)
        return run(expert_ffn, *inputs, "swiglu", backend="triton")

    for got, want in zip(result(in_gluon=True), result(in_gluon=False), strict=True):
        assert want.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what is missing where it cannot run")
def test_is_refused_where_it_cannot_run(monkeypatch) -> None:
    x, w = torch.zeros(4, 64).half(), torch.zeros(1, 256, 64).half()
    assert not gluon_up.suits_gluon(x, w)
    with pytest.raises(RuntimeError, match=r"has no Gluon|for sm_90 alone"):
        gluon_up.check_widths(x, w)
    monkeypatch.setattr(gluon_up, "check_suited", lambda *tensors: None)
    with pytest.raises(RuntimeError, match="24 is no multiple of 64"):
        gluon_up.check_widths(x[:, :24], w[..., :24])
