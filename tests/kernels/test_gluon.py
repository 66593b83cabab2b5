"""The forms in Gluon: interpreted against the loop twin, and on sm_90 against those in Triton."""

from types import SimpleNamespace

import pytest
import torch
from gluon_interpreter import ORDERS, DeadlockError, Order, interpret
from on_device import DEVICE, assert_close, poisoned  # first: it skips this file without Triton
from test_experts import TOLERANCE, expected, run

from dmoe.ops import RowMap, expert_ffn

configs = pytest.importorskip("dmoe_kernels.configs")
common = pytest.importorskip("dmoe_kernels.gluon_common")
gluon_outer = pytest.importorskip("dmoe_kernels.gluon_outer")
gluon_up = pytest.importorskip("dmoe_kernels.gluon_up")

interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="interpreted on a CPU")
runs = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9 or not common.HAS_GLUON,
    reason="Gluon's kernels run on sm_90 with Triton 3.6",
)
COUNTS = ([1], [0, 1, 128, 129, 300], [64, 65, 0, 63], [0, 0, 0], [700, 0, 1, 2000, 127, 255, 257])
H100_SHARED_MEMORY = 232448
FFN_DIM = {128: 256, 192: 768}
"""For a block of the weight gradient, the least that it and the other forms divide."""


def make(counts: list[int], dtype: torch.dtype, dim: int, ffn_dim: int, spare: int = 5):
    """Return x, the row map, gates, counts, weights, a gradient; `spare` rows have no source."""
    torch.manual_seed(0)
    sources, num_rows = 37, sum(counts)
    rows = RowMap.from_index(torch.randint(sources, (num_rows,)), sources)
    past = torch.zeros(spare, dtype=torch.int64)
    padded = (torch.cat((rows.index_R, past)), torch.cat((rows.by_source_R, past)))
    return (
        torch.randn(sources, dim).to(DEVICE, dtype),
        RowMap(*(part.to(DEVICE) for part in (*padded, rows.offsets_N1))),
        torch.rand(num_rows + spare).to(DEVICE),
        torch.tensor(counts).to(DEVICE),
        (torch.randn(len(counts), 2 * ffn_dim, dim) * dim**-0.5).to(DEVICE, dtype),
        (torch.randn(len(counts), dim, ffn_dim) * ffn_dim**-0.5).to(DEVICE, dtype),
        torch.randn(sources, dim).to(DEVICE, dtype),
    )


def take(monkeypatch: pytest.MonkeyPatch, *, gluon: bool, block_m: int = 128) -> None:
    """Let products take their forms in Gluon, those of `block_m` if there are, or none."""
    wanted = gluon

    def choose(kernel, form, dtype, shape, device, run, *, tma=False, gluon=False, even_k=True):
        if DEVICE.type == "cuda":
            fitting = configs._candidates_of(kernel, dtype, device, tma=tma, gluon=gluon)
        else:
            fitting = configs.candidates(kernel, 2, H100_SHARED_MEMORY, wgmma=True, gluon=gluon)
        assert gluon or not wanted or kernel == "dz"
        mine = [c for c in fitting if c.gluon == (wanted and gluon)]
        return next((c for c in mine if c.block_m == block_m), mine[0])

    for module in ("up", "dz", "grouped_gemm"):
        monkeypatch.setattr(f"dmoe_kernels.{module}.choose", choose)


@interpreted
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_m", [128, 192])
@pytest.mark.parametrize(
    ("counts", "dtype", "recompute"),
    [
        ([64, 65, 0, 63], torch.bfloat16, False),
        ([0, 1, 128, 129, 300], torch.float16, True),
        ([1], torch.bfloat16, True),
        ([0, 0, 0], torch.float16, False),
    ],
)
def test_equals_the_loop(monkeypatch, counts, dtype, recompute, block_m, order: Order) -> None:
    """Whatever is done at once or late, and whoever goes on; again in memory that is NaN."""
    interpret(monkeypatch, order)
    take(monkeypatch, gluon=True, block_m=block_m)
    inputs = make(counts, dtype, 256, FFN_DIM[block_m])
    options = {"activation": "swiglu", "backend": "triton", "recompute": recompute}
    with poisoned():
        actual = run(expert_ffn, *inputs, **options)
    x, rows, weights, *others = inputs
    kept = RowMap(rows.index_R[:-5], rows.by_source_R[:-5], rows.offsets_N1)
    y, dx, dweights, *dw = expected((x, kept, weights[:-5], *others), "swiglu")
    assert not actual[2][-5:].any()
    actual[2] = actual[2][:-5]
    for got, want in zip(actual, (y, dx, dweights, *dw), strict=True):
        assert_close(got, want, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("block_m", [128, 192])
def test_weights_may_be_wider_than_rows(monkeypatch, block_m: int) -> None:
    interpret(monkeypatch, ORDERS[0])
    take(monkeypatch, gluon=True, block_m=block_m)
    x, rows, weights, counts, w_up, w_down, dy = make(
        [3, 0, 130], torch.bfloat16, 256, FFN_DIM[block_m], spare=0
    )
    wide = (x, rows, weights, counts, w_up.float(), w_down.float(), dy)
    actual = run(expert_ffn, *wide, "swiglu", backend="triton")
    assert [t.dtype for t in actual] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for got, want in zip(actual, expected(wide, "swiglu"), strict=True):
        assert_close(got, want, TOLERANCE[torch.bfloat16])


@interpreted
@pytest.mark.parametrize("experts", [1, 5, 64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("size_k", "size_n"), [(64, 256), (320, 768)])
def test_any_width(monkeypatch, experts: int, transposed: bool, size_k: int, size_n: int) -> None:
    """One step of K, and fewer than the ring has; one tile of columns, and several."""
    from dmoe_kernels.grouped_gemm import grouped_gemm

    torch.manual_seed(0)
    counts = torch.randint(0, 9, (experts,)) * torch.randint(0, 2, (experts,)) + 70 // experts
    rows, shape = int(counts.sum()), (size_n, size_k) if transposed else (size_k, size_n)
    x, w = torch.randn(rows, size_k).half(), torch.randn(experts, *shape).half()
    take(monkeypatch, gluon=True)
    wide = w.double().mT if transposed else w.double()
    parts = zip(x.split(counts.tolist()), wide, strict=True)
    want = torch.cat([part.double() @ matrix for part, matrix in parts])
    for order in ORDERS:
        interpret(monkeypatch, order)
        got = grouped_gemm(x, w, counts, transposed=transposed, num_rows=rows)
        assert_close(got, want, TOLERANCE[torch.float16])


FAULTS = {
    "no fence": {"fence_async_shared": lambda: None},
    "a stage is free while it is read": {"stage_before": lambda stage, STAGES: stage},
    "phases never change": {
        "next_stage": lambda stage, phase, STAGES: ((stage + 1) % STAGES, phase)
    },
    "products are not waited for": {"warpgroup_mma_wait": lambda left, deps: deps[0]},
    "stores are not waited for": {"tma": {"store_wait": lambda left: None}},
    "barriers are not waited for": {"mbarrier": {"wait": lambda *args, pred=True: None}},
    "nothing is freed": {"mbarrier": {"arrive": lambda *args, pred=True: None}},
    "too few bytes are expected": {
        "mbarrier": {"expect": lambda barrier, num_bytes: barrier.arrive(more_bytes=num_bytes // 2)}
    },
    "copies by threads are not waited for": {
        "async_copy": {
            "mbarrier_arrive": lambda barrier, increment_count: barrier.arrive(128),
        }
    },
}


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("module", [gluon_up, gluon_outer])
def test_the_interpreter_finds_faults(monkeypatch, module, fault: str) -> None:
    """In one of the orders at least: it raises, or numbers are wrong."""
    inputs = make([140, 64], torch.bfloat16, 320 if module is gluon_up else 256, 256, spare=0)
    take(monkeypatch, gluon=True)
    want = expected(inputs, "swiglu")

    def is_right(order: Order) -> bool:
        interpret(monkeypatch, order)
        for name, instead in FAULTS[fault].items():
            if isinstance(instead, dict):
                instead = SimpleNamespace(**vars(getattr(module, name)) | instead)
            monkeypatch.setattr(module, name, instead)
        try:
            actual = run(expert_ffn, *inputs, "swiglu", backend="triton")
        except (AssertionError, DeadlockError):
            return False
        errors = [(a - b).norm() / b.norm() for a, b in zip(actual, want, strict=True)]
        return all(error < TOLERANCE[torch.bfloat16] for error in errors)

    assert not all(is_right(order) for order in ORDERS)
