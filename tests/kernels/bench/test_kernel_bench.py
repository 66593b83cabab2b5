"""The benchmark's parts that need no GPU: its command line, its shapes, its checks, its twins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_device import INTERPRETER_FAILS  # first: it skips this file where Triton is missing

interpreted = pytest.mark.skipif(bool(INTERPRETER_FAILS), reason=INTERPRETER_FAILS)
ROOT = Path(__file__).parents[3]
BENCH = ROOT / "kernels" / "bench"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@interpreted
def test_its_checks_hold_without_a_gpu() -> None:
    result = run(str(BENCH), "--dry")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok\n") == 6
    assert "twice the same bits: True" in result.stdout


def test_without_a_gpu_it_says_so() -> None:
    result = run(str(BENCH), CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert result.returncode == 2
    assert "no GPU here" in result.stderr


def test_help_and_unknown_options() -> None:
    assert "--seconds" in run(str(BENCH), "--help").stdout
    assert run(str(BENCH), "--fast").returncode == 2


def test_shapes_are_those_of_the_roofline() -> None:
    code = "import json, problem; print(json.dumps([s.forward_flop for s in problem.SHAPES]))"
    result = run("-c", code, PYTHONPATH=str(BENCH))
    flop = [round(number / 1e12, 2) for number in json.loads(result.stdout)]
    assert flop == [2.47, 3.3, 0.46, 6.6, 3.3, 1.65, 0.31]


@interpreted
def test_contenders_in_torch_agree_and_the_table_has_a_row() -> None:
    code = """
import torch, contenders, measure, problem, run
shape = problem.TINY
made = problem.Problem.make(shape, torch.device("cpu"), torch.float32)
named = contenders.CONTENDERS
loop, fast = (named[name](made, made.leaves()) for name in ("torch loop", "grouped_mm"))
print((loop - fast).norm().item())
print(measure.saved_bytes(named["ours"], made))
bench = run.Bench.__new__(run.Bench)
bench.cublas = 700.0
print(bench.line(run.Row(problem.SHAPES[0], "ours", 5.0, 15.0, 10**9, 1e-3)))
import infinity
neurons = infinity.Neurons.make(infinity.TINY, torch.device("cpu"), torch.float32)
ours, one, other = (contender(neurons, 8) for contender in infinity.CONTENDERS.values())
print(max((ours - one).norm().item(), (other - one).norm().item()) / one.norm().item())
"""
    paths = f"{BENCH}{os.pathsep}{ROOT / 'kernels'}"
    result = run("-c", code, PYTHONPATH=paths, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    difference, saved, row, of_neurons = result.stdout.splitlines()
    assert float(difference) < 1e-4
    assert float(of_neurons) < 1e-5
    rows, experts, width = 37 * 2, 5, 2 * 24
    # x and z in float32, gates, and the maps in int64.
    assert int(saved) == 4 * (37 * 32 + rows * width) + 4 * rows + 8 * (3 * rows + 37 + 1 + experts)
    assert row == ("| Qwen3-30B-A3B | ours | 5.00 | 495 | 15.00 | 495 | 71% | 1000 | 1.0e-03 |")


@interpreted
def test_peers_come_last_and_other_rows_of_a_page_stay(tmp_path: Path) -> None:
    code = """
import argparse, sys, time
from pathlib import Path
import torch, run
from problem import SHAPES
torch.cuda.get_device_name = lambda: "Some GPU"
run.measure.cublas_tflops = lambda: 700.0
page = Path(sys.argv[1])
calls = []

class Bench(run.Bench):
    def run_shape(self, shape, names):
        calls.append(names)
        for name in names:
            self.rows[shape.name, name] = run.Row(shape, name, len(calls), 9.0, 10**6, 1e-3)

def run_with(deadline, **options):
    options = {"shapes": None, "layer": None, "only": None, "repeats": 3} | options
    bench = Bench(argparse.Namespace(out=page, **options), deadline)
    bench.neurons = "\\n## Neurons\\n"
    bench.run()
    return page.exists() and page.read_text()

late = time.monotonic() + 1e6
first = run_with(late, shapes=["Qwen3"], add=False)
plain = ["ours", "ours, fp8", "torch loop", "grouped_mm", "transformers"]
assert calls[0] == calls[1] == plain, calls
assert calls[2] == [*plain, *run.PEERS] and len(calls) == 4
assert first.count("| Qwen3-30B-A3B | ours |") == 1 and first.count("\\n| ") == 20
second = run_with(late, shapes=["OLMoE"], only=["ours", "Liger"], add=True)
rows = [line for line in second.splitlines() if line.startswith("| ")][2:]
assert [row.split(" | ")[0] for row in rows[:9]] == ["| Qwen3-30B-A3B"] * 9
assert [row.split(" | ")[:2] for row in rows[9:11]] == [
    ["| OLMoE-1B-7B", "ours"], ["| OLMoE-1B-7B", "Liger"]
], rows
assert second.endswith("\\n## Neurons\\n")
for experts in (4, 16):
    own = run_with(late, layer=[64, 32, 24, experts, 2], only=["ours"], add=True)
names = [line.split(" | ")[0] for line in own.splitlines() if line.startswith("| ")][2:]
assert len(names) == 22, names
assert names[-2:] == [f"| T = 64, D = 32, F = 24, E = {experts}, K = 2" for experts in (16, 4)]
calls.clear()
page = page.with_name("other.md")
run_with(0.0, shapes=["OLMoE"], add=False)
assert not calls and not page.exists()
print("held")
"""
    paths = f"{BENCH}{os.pathsep}{ROOT / 'kernels'}"
    page = str(tmp_path / "page.md")
    result = run("-c", code, page, PYTHONPATH=paths, TRITON_INTERPRET="1")
    assert result.stdout.endswith("time was up\nheld\n"), result.stdout + result.stderr


@interpreted
def test_peers_may_tune_by_a_few_runs() -> None:
    """A first run that is not timed, then the shortest of so many."""
    code = """
import measure, torch
from triton.runtime.autotuner import Autotuner
times = iter([3.0, 2.0])

class Event:
    def __init__(self, enable_timing): pass
    def record(self): pass
    def synchronize(self): pass
    def elapsed_time(self, end): return next(times)

torch.cuda.Event = Event
measure.limit_tuning(2)
calls = []
print(Autotuner.do_bench(lambda: calls.append(1), quantiles=(0.5, 0.2, 0.8)), len(calls))
"""
    paths = f"{BENCH}{os.pathsep}{ROOT / 'kernels'}"
    result = run("-c", code, PYTHONPATH=paths, TRITON_INTERPRET="1")
    assert result.stdout == "[2.0, 2.0, 2.0] 3\n", result.stderr
