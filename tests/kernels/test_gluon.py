"""The forms in Gluon: interpreted against torch, and on sm_90 against the forms in Triton."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_interpreter import ORDERS, interpret
from gluon_machine import FaultError, Order, Partition, Pointer
from on_device import DEVICE, assert_close, poisoned  # first: it skips this file without Triton
from test_experts import TOLERANCE, expected, run

from dmoe.ops import RowMap, expert_ffn

configs = pytest.importorskip("dmoe_kernels.configs")
common = pytest.importorskip("dmoe_kernels.gluon_common")
gluon_outer = pytest.importorskip("dmoe_kernels.gluon_outer")
gluon_up = pytest.importorskip("dmoe_kernels.gluon_up")
products = pytest.importorskip("dmoe_kernels.grouped_gemm")
up = pytest.importorskip("dmoe_kernels.up").up

interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="interpreted on a CPU")
runs = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9 or not common.HAS_GLUON,
    reason="Gluon's kernels run on sm_90 with Triton 3.6",
)
COUNTS = ([1], [0, 1, 128, 129, 300], [64, 65, 0, 63], [0, 0, 0], [700, 0, 1, 2000, 127, 255, 257])
H100_SHARED_MEMORY = 232448
# A tile of the weight gradient has 128 x 256 or 192 x 256 numbers, and F is a side of it.
FFN_DIM = {128: 256, 192: 768}


def make(counts: list[int], dtype: torch.dtype, dim: int, ffn_dim: int, spare: int = 5):
    """Return x, the row map, gates, counts, weights, a gradient; `spare` rows have no source."""
    torch.manual_seed(0)
    sources, num_rows = 37, sum(counts)
    rows = RowMap.from_index(torch.randint(sources, (num_rows,)), sources)
    past = torch.randint(sources, (spare,))
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


def take(monkeypatch: pytest.MonkeyPatch, *, in_gluon: bool, block_m: int = 128) -> None:
    """Let products take their forms in Gluon, that of `block_m` if there is one, or none of them.

    Interpreted, three tiles are a group, so that a few tiles make several.
    """

    def choose(kernel, form, dtype, shape, device, run, *, tma=False, gluon=False, even=True):
        if in_gluon and kernel != "dz" and not gluon:
            pytest.fail(f"{kernel} has no form in Gluon for {shape}")
        if DEVICE.type == "cuda":
            fitting = configs._candidates_of(kernel, dtype, device, tma=tma, gluon=gluon)
        else:
            fitting = configs.candidates(kernel, 2, H100_SHARED_MEMORY, wgmma=True, gluon=gluon)
            fitting = [config._replace(group_m=3) for config in fitting]
        of_kind = [config for config in fitting if config.gluon == (in_gluon and gluon)]
        return next((config for config in of_kind if config.block_m == block_m), of_kind[0])

    for module in ("up", "dz", "grouped_gemm"):
        monkeypatch.setattr(f"dmoe_kernels.{module}.choose", choose)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS)
def test_equals_triton(monkeypatch, counts: list[int], dtype: torch.dtype) -> None:
    """Bit for bit."""
    inputs = make(counts, dtype, 512, 256)

    def result(in_gluon: bool) -> list[torch.Tensor]:
        take(monkeypatch, in_gluon=in_gluon)
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


@interpreted
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_m", [128, 192])
@pytest.mark.parametrize(
    ("counts", "dtype", "recompute"),
    [
        ([64, 65, 0, 63], torch.bfloat16, False),
        ([63, 1, 0, 128, 127, 129, 191, 30], torch.float16, True),
        ([1], torch.bfloat16, True),
        ([0, 0, 0], torch.float16, False),
    ],
)
def test_equals_the_loop(monkeypatch, counts, dtype, recompute, block_m, order: Order) -> None:
    """In memory that is NaN until it is written."""
    interpret(monkeypatch, order)
    take(monkeypatch, in_gluon=True, block_m=block_m)
    dim = 512 if block_m == 128 else 256
    x, rows, weights, *others = inputs = make(counts, dtype, dim, FFN_DIM[block_m])
    options = {"activation": "swiglu", "backend": "triton", "recompute": recompute}
    with poisoned():
        actual = run(expert_ffn, *inputs, **options)
    kept = RowMap(rows.index_R[:-5], rows.by_source_R[:-5], rows.offsets_N1)
    assert not actual[2][-5:].any()
    actual[2] = actual[2][:-5]
    for got, want in zip(actual, expected((x, kept, weights[:-5], *others), "swiglu"), strict=True):
        assert_close(got, want, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_m", [128, 192])
def test_weights_may_be_wider_than_rows(monkeypatch, block_m: int, order: Order) -> None:
    interpret(monkeypatch, order)
    take(monkeypatch, in_gluon=True, block_m=block_m)
    x, rows, weights, counts, w_up, w_down, dy = make(
        [3, 0, 130], torch.bfloat16, 256, FFN_DIM[block_m], spare=0
    )
    wide = (x, rows, weights, counts, w_up.float(), w_down.float(), dy)
    actual = run(expert_ffn, *wide, "swiglu", backend="triton")
    assert [t.dtype for t in actual] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for got, want in zip(actual, expected(wide, "swiglu"), strict=True):
        assert_close(got, want, TOLERANCE[torch.bfloat16])


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("experts", "size_k", "size_n"), [(1, 64, 256), (5, 320, 768), (64, 64, 512)]
)
def test_products_of_any_width(monkeypatch, transposed, experts, size_k, size_n) -> None:
    """One step of K, and one more than the ring has; one tile of columns, and several."""
    torch.manual_seed(0)
    counts = torch.randint(0, 9, (experts,)) * torch.randint(0, 2, (experts,)) + 70 // experts
    rows, shape = int(counts.sum()), (size_n, size_k) if transposed else (size_k, size_n)
    x, w = torch.randn(rows, size_k).half(), torch.randn(experts, *shape).half()
    take(monkeypatch, in_gluon=True)
    wide = w.double().mT if transposed else w.double()
    parts = zip(x.split(counts.tolist()), wide, strict=True)
    want = torch.cat([part.double() @ matrix for part, matrix in parts])
    for order in ORDERS:
        interpret(monkeypatch, order)
        got = products.grouped_gemm(x, w, counts, transposed=transposed, num_rows=rows)
        assert_close(got, want, TOLERANCE[torch.float16])


@interpreted
@pytest.mark.parametrize("order", ORDERS)
def test_gathered_rows_of_any_width(monkeypatch, order: Order) -> None:
    """Tiles begin at each stage of the ring; where numbers are rounded shows in the last bits."""
    x, rows, weights, counts, w_up, *_ = make([140, 0, 64, 65], torch.bfloat16, 320, 256, spare=0)
    interpret(monkeypatch, order)
    take(monkeypatch, in_gluon=True)
    z, a = up(x, rows.index_R, weights, counts, w_up, "swiglu")
    groups = zip(x[rows.index_R].split(counts.tolist()), w_up, strict=True)
    assert_close(z, torch.cat([part.double() @ w.double().mT for part, w in groups]), 3e-3)
    gate, linear = z.float().chunk(2, dim=1)
    want = torch.nn.functional.silu(gate) * linear * weights[:, None]
    assert (a == want.bfloat16()).float().mean() > 0.99  # exp may differ in its last bit


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (7, 3), (8, 1)])
def test_every_tile_is_found_once(monkeypatch, rows: int, columns: int) -> None:
    """Of 3 in a group; past the last tile there are no rows."""
    interpret(monkeypatch, ORDERS[0])
    bound = rows + 2
    table = torch.arange(3 * bound, dtype=torch.int32)
    sizes = (Pointer(table), rows, bound, 256 * columns, 64)
    found = [gluon_up.find_tile(tile, sizes, 3) for tile in range(rows * columns + 5)]
    assert {(row, n) for _, row, _, n in found[: rows * columns]} == {
        (bound + m, n) for m in range(rows) for n in range(columns)
    }
    assert all(end == bound + row for _, row, end, _ in found[: rows * columns])
    assert all((row, end) == (0, 0) for _, row, end, _ in found[rows * columns :])


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (7, 3), (8, 1)])
def test_every_tile_of_a_gradient_is_found_once(monkeypatch, rows: int, columns: int) -> None:
    interpret(monkeypatch, ORDERS[0])
    experts, groups = 2, 2
    offsets = torch.tensor([0, 10, 15, 0], dtype=torch.int32)
    sizes = (Pointer(offsets), experts, 64 * groups * rows, 256 * columns)
    number = experts * rows * columns
    found = [gluon_outer._find(tile, sizes, groups, 3) for tile in range(number + 5)]
    assert {(expert, left, right) for expert, _, _, left, right in found[:number]} == {
        (e, 64 * groups * m, 256 * n)
        for e in range(experts)
        for m in range(rows)
        for n in range(columns)
    }
    assert all(tile[1:3] == ((0, 10) if tile[0] == 0 else (10, 15)) for tile in found[:number])
    assert all(tile[1:3] == (0, 0) for tile in found[number:])


def _wait_for_one_fewer(real: SimpleNamespace) -> dict[str, Any]:
    """Free each stage one product too early."""
    wait = real.warpgroup_mma_wait
    return {"warpgroup_mma_wait": lambda left, deps: wait(left + 1 if left else 0, deps)}


def _copies_unfinished(real: SimpleNamespace) -> dict[str, Any]:
    """Arrive before copies of threads have come."""
    return {"async_copy.mbarrier_arrive": lambda barrier, increment_count: barrier.arrive(128)}


def _too_few_bytes(real: SimpleNamespace) -> dict[str, Any]:
    """Do not wait for half of what TMA brings."""
    expect = real.mbarrier.expect
    return {"mbarrier.expect": lambda barrier, num_bytes: expect(barrier, num_bytes // 2)}


FAULTS = {
    "none": lambda real: {},
    "no fence": lambda real: {"fence_async_shared": lambda: None},
    "a stage is freed one product too early": _wait_for_one_fewer,
    "products are not waited for": lambda real: {"warpgroup_mma_wait": lambda left, deps: deps[0]},
    "stores are not waited for": lambda real: {"tma.store_wait": lambda left: None},
    "barriers are not waited for": lambda real: {"mbarrier.wait": lambda *args, pred=True: None},
    "nothing is freed": lambda real: {"mbarrier.arrive": lambda *args, pred=True: None},
    "phases never change": lambda real: {
        "next_stage": lambda stage, phase, STAGES: ((stage + 1) % STAGES, phase)
    },
    "stages before the first": lambda real: {"stage_before": lambda stage, STAGES: stage - 1},
    "copies by threads are not waited for": _copies_unfinished,
    "too few bytes are expected": _too_few_bytes,
}


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("module", [gluon_up, gluon_outer])
def test_the_interpreter_finds_faults(monkeypatch, module, fault: str) -> None:
    """In one of the orders at least, it raises, or numbers are wrong."""
    x, (index, *_), weights, counts, w_up, *_ = make(
        [140, 64, 65], torch.bfloat16, 256, 256, spare=0
    )
    z, ends = torch.randn(len(index), 256).bfloat16(), [0, 140, 204, 269, 0]
    groups = [slice(*pair) for pair in itertools.pairwise(ends[:-1])]
    if module is gluon_up:
        want = torch.cat(
            [x[index[g]].double() @ w.double().mT for g, w in zip(groups, w_up, strict=True)]
        )
    else:
        want = torch.stack([z[g].double().mT @ x[index[g]].double() for g in groups])

    def product() -> torch.Tensor:
        if module is gluon_up:
            return up(x, index, weights, counts, w_up, "swiglu")[0]
        offsets = torch.tensor(ends, dtype=torch.int32)
        return products.grouped_outer(z, x, index, offsets, gather_a=False, dtype=x.dtype)

    def is_right(order: Order) -> bool:
        interpret(monkeypatch, order)
        for path, instead in FAULTS[fault](SimpleNamespace(**vars(module))).items():
            name, _, part = path.partition(".")
            if part:
                instead = SimpleNamespace(**vars(getattr(module, name)) | {part: instead})
            monkeypatch.setattr(module, name, instead)
        try:
            return bool((product() - want).norm() < TOLERANCE[torch.bfloat16] * want.norm())
        except FaultError:
            return False

    take(monkeypatch, in_gluon=True)
    # What is left undone at the end is a fault of its own, and would show most others.
    leaves_work = Partition.leaves_work
    monkeypatch.setattr(Partition, "leaves_work", lambda self: leaves_work(self) and False)
    assert all(map(is_right, ORDERS)) == (fault == "none")
