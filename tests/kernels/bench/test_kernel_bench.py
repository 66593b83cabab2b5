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
    # Nor without the training code, whose import raises here.
    code = """
import runpy, sys
sys.modules["dmoe"] = None
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    result = run("-c", code, str(BENCH), "--dry")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok\n") == 7
    assert "twice the same bits: True" in result.stdout


def test_without_a_gpu_it_says_so() -> None:
    result = run(str(BENCH), CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert result.returncode == 2
    assert "no GPU here" in result.stderr


def test_help_and_unknown_options() -> None:
    assert "--seconds" in run(str(BENCH), "--help").stdout
    assert run(str(BENCH), "--fast").returncode == 2
    unknown = run(str(BENCH), "--only", "liger")
    assert unknown.returncode == 2
    assert "--only liger: there are ours" in unknown.stderr


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


# A run whose parts that need a GPU are fakes; `ready` and `turns` say what it did.
FAKES = """
import argparse, importlib.util, sys, time
from pathlib import Path
import torch, run
from problem import SHAPES, TINY, Problem
torch.cuda.get_device_name = lambda *_: "Some GPU"
torch.cuda.empty_cache = lambda: None
torch.cuda.is_available = lambda: True
run.check = lambda *_: True
run.measure.cublas_tflops = lambda: 700.0
run.infinity.table = lambda repeats: "\\n## Neurons\\n"
tiny = Problem.make(TINY, torch.device("cpu"), torch.float32)
run.Problem.make = lambda *_: tiny
absent = ["MegaBlocks", "SonicMoE"]
run.runs_here = lambda name: name not in absent
ready, turns = [], []
found = {"ours": 4e-3, "ours, fp8": 6.6e-2}

def prepare(name, problem):
    ready.append(name)
    if name in stuck:
        stuck[name]()
    return 10**6, found.get(name, 5e-3)

def times_ms(steps, repeats):
    turns.append(list(steps))
    return dict.fromkeys(steps, float(len(turns)))

stuck = {}
run.prepare, run.measure.times_ms = prepare, times_ms
page = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("bench_main", sys.argv[2])
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)

def main(*words):
    ready.clear()
    turns.clear()
    return command.main(["--out", str(page), *words])

def rows():
    return [line.strip("| ").split(" | ")[:2] for line in page.read_text().splitlines()
            if line.startswith("| ")][2:]
"""


def run_with_fakes(code: str, page: Path, returns: int = 0) -> str:
    """Run code that must end with a number, and return what it printed of errors."""
    paths = f"{BENCH}{os.pathsep}{ROOT / 'kernels'}"
    arguments = ("-c", FAKES + code, str(page), str(BENCH / "__main__.py"))
    result = run(*arguments, PYTHONPATH=paths, TRITON_INTERPRET="1")
    assert result.returncode == returns, result.stdout + result.stderr
    return result.stderr


@interpreted
def test_peers_come_last_and_other_rows_of_a_page_stay(tmp_path: Path) -> None:
    code = """
plain = ["ours", "ours, fp8", "torch loop", "grouped_mm", "transformers"]
again = [name for name in plain if name != "torch loop"]
assert main("--shapes", "Qwen3") == 0
assert ready == 2 * plain + 2 * ["ScatterMoE"] + 2 * ["Liger"], ready
# Forward, then both; ours alone after the first.
assert turns[:8] == 2 * [plain, plain, ["ours"], ["ours"]], turns
assert turns[8:] == 4 * [["ScatterMoE", *again]] + 4 * [["Liger", *again, "ScatterMoE"]], turns
assert rows() == [[shape.name, name] for shape in (SHAPES[0], SHAPES[-1])
                  for name in [*plain, "ScatterMoE", "Liger"]]
text = page.read_text()
assert "does not have it: SonicMoE, MegaBlocks" in text and "as take 1 s, but not below 5" in text
assert text.count("ours without turns: 3.00 ms forward, 4.00 both") == 1

assert main("--shapes", "OLMoE", "--only", "ours", "Liger", "--add") == 0
assert rows()[7:9] == [["OLMoE-1B-7B", "ours"], ["OLMoE-1B-7B", "Liger"]], rows()
assert main("--shapes", "infinity", "--add") == 0 and len(rows()) == 16 and not ready
assert page.read_text().endswith("\\n## Neurons\\n")
for experts in ("4", "16"):
    layer = ["--layer", "64", "32", "24", experts, "2"]
    assert main(*layer, "--only", "ours", "--add", "--tune") == 0
assert [row[0] for row in rows()[16:]] == [
    f"T = 64, D = 32, F = 24, E = {experts}, K = 2" for experts in (16, 4)]
assert page.read_text().endswith("\\n## Neurons\\n")
"""
    run_with_fakes(code, tmp_path / "page.md")


@interpreted
def test_nothing_is_done_anew_without_a_peer(tmp_path: Path) -> None:
    code = """
def fails():
    raise ValueError("it cannot")

stuck["Liger"] = stuck["grouped_mm"] = fails
absent.append("ScatterMoE")
assert main("--shapes", "OLMoE") == 0
assert ready == ["ours", "ours, fp8", "torch loop", "grouped_mm", "transformers", "Liger"], ready
assert len(turns) == 4
assert "OLMoE-1B-7B, Liger: ValueError: it cannot" in page.read_text()
absent.append("Liger")
assert main("--shapes", "OLMoE") == 0 and ready[-1] == "transformers"
"""
    run_with_fakes(code, tmp_path / "page.md")


@interpreted
def test_it_fails_where_ours_does_and_writes_the_page_before(tmp_path: Path) -> None:
    code = """
def fails():
    raise RuntimeError("it does")

for name, error in (("ours", 1.1e-2), ("ours", float("inf")), ("ours, fp8", 0.11)):
    before, found[name] = found[name], error
    assert main("--shapes", "OLMoE") == 1
    assert f"OLMoE-1B-7B, {name}: the error {error:.1e} is too large" in page.read_text()
    found[name] = before
stuck["ours"] = fails
assert main("--shapes", "OLMoE") == 1
assert "OLMoE-1B-7B, ours: RuntimeError: it does" in page.read_text()
assert ["OLMoE-1B-7B", "Liger"] in rows()
stuck.clear()
run.infinity.table = lambda repeats: fails()
assert main("--shapes", "OLMoE") == 0 and "infinity-MoE" not in page.read_text()
assert main() == 1 and "infinity-MoE: RuntimeError" in page.read_text() and len(rows()) == 49
"""
    run_with_fakes(code, tmp_path / "page.md")


@interpreted
def test_it_fails_where_ours_does_not_end(tmp_path: Path) -> None:
    code = """
stuck["ours"] = lambda: time.sleep(100)
main("--shapes", "OLMoE", "--seconds", "2")
"""
    run_with_fakes(code, tmp_path / "page.md", returns=1)
    assert "- OLMoE-1B-7B, ours: the time was up here" in (tmp_path / "page.md").read_text()


@interpreted
@pytest.mark.parametrize("error", [4e-3, 1.0])
def test_it_ends_in_time_whatever_a_peer_does(tmp_path: Path, error: float) -> None:
    code = f"""
found["ours"] = {error}
stuck["Liger"] = lambda: time.sleep(100)
main("--shapes", "OLMoE", "--seconds", "2")
"""
    run_with_fakes(code, tmp_path / "page.md", returns=int(error > 1e-2))
    page = (tmp_path / "page.md").read_text()
    assert "- OLMoE-1B-7B, Liger: the time was up here" in page
    assert "| OLMoE-1B-7B | ScatterMoE |" in page


@interpreted
def test_it_ends_though_a_peer_lets_no_other_thread_run(tmp_path: Path) -> None:
    code = """
import re
stuck["Liger"] = lambda: re.match("(a|a)*b", 100 * "a")
command.SLACK = 1.0
main("--shapes", "OLMoE", "--seconds", "2")
"""
    assert "Timeout" in run_with_fakes(code, tmp_path / "page.md", returns=1)
    assert "| OLMoE-1B-7B | ScatterMoE |" in (tmp_path / "page.md").read_text()


@interpreted
def test_slow_contenders_run_less_and_all_take_turns() -> None:
    code = """
import measure, torch
clock, order = [0.0], []

class Event:
    def __init__(self, enable_timing): pass
    def record(self): self.at = clock[0]
    def elapsed_time(self, end): return 1e3 * (end.at - self.at)

def step(name, seconds):
    def call():
        order.append(name)
        clock[0] += seconds
    return call

torch.cuda.Event, torch.cuda.synchronize = Event, lambda: None
measure.time.perf_counter = lambda: clock[0]
zeros = torch.zeros(1)
torch.empty = lambda *_, **__: zeros
steps = {"fast": step("fast", 0.01), "slow": step("slow", 0.06), "slowest": step("slowest", 0.9)}
times = measure.times_ms(steps, 50)
assert [round(ms, 6) for ms in times.values()] == [10, 60, 900], times
timed = order[6:]  # two runs of each before
assert [timed.count(name) for name in steps] == [50, 16, 5], timed
for first in range(0, 50, 10):  # a run of the slowest in each tenth of the fast ones
    places = [place for place, name in enumerate(timed) if name == "fast"][first : first + 10]
    assert "slowest" in timed[places[0] : places[-1] + 3]
print(measure.num_runs(step("slowest", 0.9), 3))
"""
    result = run("-c", code, PYTHONPATH=f"{BENCH}{os.pathsep}{ROOT / 'kernels'}")
    assert result.stdout == "3\n", result.stdout + result.stderr


@interpreted
def test_a_graph_is_replayed_on_other_tokens_and_counts() -> None:
    code = """
import contextlib
import measure, torch
from problem import TINY, Problem

def layer(problem, leaves):  # its speed is not that of Triton's interpreter
    x, logits, up, down = leaves
    return x * logits.softmax(-1).amax(-1, keepdim=True) * up.mean() * down.mean()

class Stream:
    def wait_stream(self, other): pass

class Graph:
    def replay(self):
        if replays:
            problem, leaves, outputs = captured
            for old, new in zip(outputs, results(measure.our_layer, problem, leaves)):
                old.copy_(new)

def recorded(contender, problem, leaves):
    outputs = results(contender, problem, leaves)
    if inside:
        captured[:] = problem, leaves, outputs
    return outputs

@contextlib.contextmanager
def capture(graph):
    inside.append(graph)
    yield
    inside.clear()

inside, captured, results = [], [], measure.results
measure.results, measure.our_layer = recorded, layer
torch.cuda.Stream = torch.cuda.current_stream = Stream
torch.cuda.stream, torch.cuda.graph, torch.cuda.CUDAGraph = contextlib.nullcontext, capture, Graph
torch.cuda.synchronize = lambda: None
for replays in (True, False):
    one, two = (Problem.make(TINY, torch.device("cpu"), torch.float32, seed) for seed in (0, 1))
    counts = [problem.ids_TK.flatten().bincount().sort().values for problem in (one, two)]
    assert not torch.equal(*counts) and not torch.equal(one.w_up_EHD, two.w_up_EHD)
    print(measure.replays_in_a_graph(one, two))
"""
    paths = f"{BENCH}{os.pathsep}{ROOT / 'kernels'}"
    result = run("-c", code, PYTHONPATH=paths, TRITON_INTERPRET="1")
    assert result.stdout == "True\nFalse\n", result.stdout + result.stderr


@interpreted
def test_errors_are_computed_in_pieces_and_what_is_no_number_is_infinite() -> None:
    code = """
import measure, torch
got, want = torch.randn(7, 3, 4).bfloat16(), torch.randn(7, 3, 4)
whole = ((got.double() - want.double()).norm() / want.double().norm()).item()
for measure.PIECE in (1, 24, 2**26):
    assert abs(measure.relative_error(got, want) - whole) < 1e-12
got[6, 0, 0] = float("nan")
print(measure.relative_error(got, want))
"""
    result = run("-c", code, PYTHONPATH=f"{BENCH}{os.pathsep}{ROOT / 'kernels'}")
    assert result.stdout == "inf\n", result.stdout + result.stderr


@interpreted
def test_a_package_is_found_without_its_import(tmp_path: Path) -> None:
    (tmp_path / "scattermoe.py").write_text("raise ImportError")
    code = """
import contenders, torch
names = ("ours", "ScatterMoE", "MegaBlocks", "ours, fp8")
for capability in ((8, 9), (9, 0)):
    torch.cuda.get_device_capability = lambda: capability
    print([contenders.runs_here(name) for name in names])
"""
    paths = os.pathsep.join(map(str, (tmp_path, BENCH, ROOT / "kernels")))
    result = run("-c", code, PYTHONPATH=paths)
    found = ["[True, True, False, False]", "[True, True, False, True]"]
    assert result.stdout.splitlines() == found, result.stdout + result.stderr


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
