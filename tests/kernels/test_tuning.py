"""How a tile shape is chosen, and what is measured for it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from on_device import DEVICE  # first: it skips this file where Triton is missing
from test_experts import make, run

from dmoe.ops import expert_ffn, tune_kernels

configs = pytest.importorskip("dmoe_kernels.configs")

SHAPE = (64, 32, 8, 128)


class Gpu:
    """Stands for sm_90: a config takes as many milliseconds as `times` says."""

    def __init__(self, times: Callable[[configs.Config], float]):
        self.times, self.measured, self.lines = times, [], []

    def run(self, config: configs.Config) -> None:
        self.measured.append(config)
        if self.times(config) < 0:
            raise RuntimeError("out of shared memory\nand more lines")

    def choose(self, kernel: str = "gemm", shape=SHAPE, **forms: bool) -> configs.Config:
        return configs.choose(kernel, "swiglu", torch.bfloat16, shape, DEVICE, self.run, **forms)


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Gpu:
    made = Gpu(lambda config: 1.0 + config.stages)

    def do_bench(call: Callable[[], object], **_: object) -> float:
        call()
        return made.times(call.args[0])

    monkeypatch.setattr(configs, "INTERPRET", SimpleNamespace(value=False))
    monkeypatch.setattr(configs, "_limits", lambda device: (232_448, True))
    monkeypatch.setattr(configs, "table_path", lambda device: tmp_path / "cache" / "table.json")
    monkeypatch.setattr(configs, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    configs.tuned.cache_clear()
    yield made
    tune_kernels(None)
    configs.tuned.cache_clear()


def fitting(**forms: bool) -> list:
    return configs.candidates(
        "gemm", 2, 232_448, wgmma=True, **{"tma": False, "gluon": False} | forms
    )


def test_nothing_is_measured_unless_asked(gpu: Gpu) -> None:
    assert gpu.choose() == fitting()[0]
    assert gpu.choose(tma=True) == fitting(tma=True)[0] != fitting()[0]
    assert not gpu.measured


def test_the_fastest_is_kept_on_disk(gpu: Gpu) -> None:
    tune_kernels(gpu.lines.append)
    best = gpu.choose()
    assert best == min(fitting(), key=gpu.times) != fitting()[0]
    assert gpu.measured == fitting()
    assert len(gpu.lines) == len(fitting())
    assert gpu.lines[0].startswith(f"gemm swiglu bfloat16 64 32 8 128: 4.000 ms, {fitting()[0]}"), (
        gpu.lines[0]
    )
    assert gpu.choose() == best
    assert len(gpu.measured) == len(fitting()), "measured once"
    tune_kernels(None)
    configs.tuned.cache_clear()  # as in another process
    assert gpu.choose() == best
    assert gpu.choose(shape=(64, 32, 8, 256)) == fitting()[0]


def test_each_size_and_what_the_tensors_allow_have_an_entry(gpu: Gpu) -> None:
    tune_kernels(gpu.lines.append)
    gpu.choose()
    for more in ({"shape": (64, 32, 8, 256)}, {"kernel": "dz"}, {"tma": True}, {"gluon": True}):
        before = len(gpu.measured)
        best = gpu.choose(**more)
        assert len(gpu.measured) > before, more
        assert gpu.choose(**more) == best
    gpu.times = lambda config: 0.0 if config.tma else 1.0
    assert gpu.choose(shape=(1, 1, 1, 1), tma=True).tma
    assert not gpu.choose(shape=(1, 1, 1, 1)).tma


def test_what_is_no_candidate_any_more_is_not_taken(gpu: Gpu) -> None:
    tune_kernels(gpu.lines.append)
    gpu.choose()
    path = configs.table_path(DEVICE)
    key = gpu.lines[0].split(":")[0]
    tune_kernels(None)
    for outdated in ([999, *fitting()[1][1:]], [128, 128]):
        path.write_text(json.dumps({key: outdated}))
        configs.tuned.cache_clear()
        assert gpu.choose() == fitting()[0]
    path.write_text(json.dumps({key: fitting()[1]}))
    configs.tuned.cache_clear()
    assert gpu.choose() == fitting()[1]


def test_widths_that_no_block_divides_leave_registers_for_masks(gpu: Gpu) -> None:
    assert gpu.choose(tma=True, even=True).block_n == 256
    assert gpu.choose(tma=True, even=False).block_n == 128


@pytest.mark.parametrize(
    ("size_k", "size_n", "even"),
    [(128, 48, True), (2048, 1000, False), (1000, 2048, False), (96, 128, False), (64, 33, False)],
)
def test_what_is_even(size_k: int, size_n: int, even: bool) -> None:
    assert configs.is_even(size_k, size_n) is even


def test_what_fails_is_passed_over(gpu: Gpu) -> None:
    tune_kernels(gpu.lines.append)
    fastest = min(fitting(), key=gpu.times)
    gpu.times = lambda config: -1.0 if config == fastest else 1.0 + config.stages
    assert gpu.choose() == min((c for c in fitting() if c != fastest), key=gpu.times)
    assert sum(line.endswith("failed: out of shared memory") for line in gpu.lines) == 1
    gpu.times = lambda config: -1.0
    with pytest.raises(RuntimeError, match="out of shared memory"):
        gpu.choose("dz")


def test_short_memory_takes_the_first_and_keeps_nothing(gpu: Gpu, monkeypatch) -> None:
    """What fits then need not be the fastest, and the run must go on."""

    def do_bench(call: Callable[[], object], **_: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(configs, "do_bench", do_bench)
    tune_kernels(gpu.lines.append)
    assert gpu.choose() == fitting()[0]
    assert "too little memory" in gpu.lines[0]
    assert not configs.table_path(DEVICE).exists()


def test_ranks_add_to_one_table(gpu: Gpu) -> None:
    """Also those that read it before the others wrote, and over a file that was cut short."""
    path = configs.table_path(DEVICE)
    path.parent.mkdir()
    path.write_text('{"gemm": [1')
    tune_kernels(gpu.lines.append)
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(lambda n: gpu.choose(shape=(n, 8, 8, 8)), range(24)))
    configs.tuned.cache_clear()
    assert len(configs.tuned(DEVICE)) == 24


def test_a_graph_that_is_captured_is_not_disturbed(gpu: Gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tune_kernels(gpu.lines.append)
    assert gpu.choose() == fitting()[0]
    assert not gpu.measured


@pytest.mark.skipif(DEVICE.type == "cuda", reason="measures for real there")
@pytest.mark.parametrize("fp8", [False, True])
def test_measuring_changes_no_result(monkeypatch, fp8: bool) -> None:
    """Each product is run once more before, and sums of gradients get it once."""
    counts, dims = [7, 0, 4] if fp8 else [7, 0, 40], (128, 128) if fp8 else (24, 40)
    inputs = make(counts, torch.float16, "swiglu", *dims)
    options = {"backend": "triton", "dtype": "fp8" if fp8 else "same"}
    measured = []

    def measure(kernel, form, dtype, shape, device, run, **_):
        run(configs._INTERPRETED)
        measured.append(kernel)
        return configs._INTERPRETED

    def results() -> list[torch.Tensor]:
        sums = tuple(torch.ones_like(w, dtype=torch.float32) for w in inputs[4:6])
        plain = run(expert_ffn, *inputs, "swiglu", **options)
        x, rows, weights, counts_E, w_up, w_down, dy = inputs
        x = x.detach().requires_grad_()
        y = expert_ffn(
            x,
            rows,
            weights,
            counts_E,
            w_up,
            w_down,
            activation="swiglu",
            main_grads=sums,
            **options,
        )
        y.backward(dy)
        return [*plain, *sums]

    want = results()
    for module in ("up", "dz", "grouped_gemm", "fp8_up", "fp8_gemm"):
        monkeypatch.setattr(f"dmoe_kernels.{module}.choose", measure)
    for got, expected in zip(results(), want, strict=True):
        assert torch.equal(got, expected)
    products = {"up_fp8", "gemm_fp8"} if fp8 else {"up", "gemm"}
    assert set(measured) == products | {"dz", "outer", "outer_add"}
