"""How it is measured: medians of interleaved runs, saved bytes, errors, and capture in a graph."""

import statistics
import time
from collections.abc import Callable

import torch
from contenders import Contender, our_layer, ours, torch_layer, torch_loop
from problem import Problem
from torch import Tensor
from triton.runtime.autotuner import Autotuner

Step = Callable[[], object]
SECONDS = 1.0
"""What the timed runs of a slow contender take together."""
FEWEST = 5
"""Runs that are timed, however slow they are."""
PIECE = 2**26
"""Numbers that are compared at once."""


def times_ms(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each step; contenders take turns, with a cold L2 cache."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    runs = {name: num_runs(step, repeats) for name, step in steps.items()}
    turns = max(runs.values())
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        name: [] for name in steps
    }
    for turn in range(turns):
        for name, step in steps.items():
            # Fewer runs than turns are spread over them: what runs in between changes the rate.
            if (turn + 1) * runs[name] // turns == turn * runs[name] // turns:
                continue
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs)
        for name, pairs in events.items()
    }


def num_runs(step: Step, repeats: int) -> int:
    """Return how many runs take `SECONDS`, from `FEWEST` to `repeats`; the first compiles."""
    step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return min(repeats, max(FEWEST, int(SECONDS / (time.perf_counter() - begun))))


def cublas_tflops(repeats: int = 20, size: int = 8192) -> float:
    """Return the rate of a large bfloat16 product of random numbers: what a GEMM can have here."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / times_ms({"gemm": lambda: a @ b}, repeats)["gemm"] / 1e9


def limit_tuning(runs: int) -> None:
    """Let Triton's autotuner, which peers use, time a config by so many runs after a first one."""

    def shortest(call: Callable[[], object], quantiles: object = None, **_: object) -> list[float]:
        call()
        times = []
        for _run in range(runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return [min(times)] * 3

    Autotuner.do_bench = staticmethod(shortest)


def forward_step(contender: Contender, problem: Problem, leaves: list[Tensor]) -> Step:
    """Return a forward pass without gradients."""

    def step() -> None:
        with torch.no_grad():
            contender(problem, leaves)

    return step


def whole_step(contender: Contender, problem: Problem, leaves: list[Tensor]) -> Step:
    """Return a forward and a backward pass, gradients of inputs, gates and weights."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        contender(problem, leaves).backward(problem.dy_TD)

    return step


def saved_bytes(contender: Contender, problem: Problem) -> int:
    """Return the bytes kept for backward, weights apart; memory that is shared counts once."""
    leaves = problem.leaves()
    weights = {leaf.untyped_storage().data_ptr() for leaf in leaves[2:]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = contender(problem, leaves)
    del y_TD
    return sum(kept.values())


def results(contender: Contender, problem: Problem, leaves: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of the leaves."""
    for leaf in leaves:
        leaf.grad = None
    y_TD = contender(problem, leaves)
    y_TD.backward(problem.dy_TD)
    return [y_TD.detach(), *(leaf.grad for leaf in leaves)]


def errors(problem: Problem) -> dict[str, float]:
    """Return how far our output and gradients are from the loop's in float32, relative by norm."""
    got = results(ours, problem, problem.leaves())
    exact = problem.to(torch.float32)
    want = results(torch_loop, exact, exact.leaves())
    names = ("y", "dx", "dgates", "dw_up", "dw_down")
    return dict(zip(names, map(relative_error, got, want), strict=True))


def layer_error(problem: Problem) -> float:
    """Return the largest of those errors for a layer with its router."""
    got = results(our_layer, problem, problem.layer_leaves())
    exact = problem.to(torch.float32)
    want = results(torch_layer, exact, exact.layer_leaves())
    return max(map(relative_error, got, want))


def output_error(contender: Contender, problem: Problem) -> float:
    """Return how far a contender's output is from ours, relative by norm."""
    with torch.no_grad():
        return relative_error(*(run(problem, problem.leaves()) for run in (contender, ours)))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference, relative to that of `want`; infinite if not a number."""
    # In pieces, as the copies in float64 of all weights' gradients would not fit beside them.
    rows = max(1, PIECE // want[0].numel())
    pieces = [
        torch.stack([(a.double() - b.double()).norm(), b.double().norm()])
        for a, b in zip(got.split(rows), want.split(rows), strict=True)
    ]
    difference, norm = torch.stack(pieces).norm(dim=0)
    return (difference / norm).nan_to_num(nan=torch.inf).item()


def repeats_bit_for_bit(problem: Problem) -> bool:
    """Say whether two runs of a layer of ours give the same bits."""
    first, second = (results(our_layer, problem, problem.layer_leaves()) for _ in range(2))
    return all(map(torch.equal, first, second))


def replays_in_a_graph(problem: Problem, other: Problem) -> bool:
    """Capture a whole layer, forward and backward, in a CUDA graph; replay it on another problem.

    What is captured cannot wait for the GPU, so this shows that nothing does. The results must be
    those of a plain run on the other's tokens, routing and weights, bit for bit.
    """
    leaves = problem.layer_leaves()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(our_layer, problem, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(our_layer, problem, leaves)
    others = other.layer_leaves()
    with torch.no_grad():
        for old, new in zip([problem.dy_TD, *leaves], [other.dy_TD, *others], strict=True):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    return all(map(torch.equal, got, results(our_layer, other, others)))
