"""How it is measured: medians of interleaved runs, saved bytes, errors, and capture in a graph."""

import statistics
from collections.abc import Callable

import torch
from contenders import Contender, ours, torch_loop
from problem import Problem
from torch import Tensor
from triton.runtime.autotuner import Autotuner

Step = Callable[[], object]


def times_ms(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each step; contenders take turns, with a cold L2 cache."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        name: [] for name in steps
    }
    for _ in range(repeats):
        for name, step in steps.items():
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


def results(contender: Contender, problem: Problem) -> dict[str, Tensor]:
    """Return output and gradients by name."""
    leaves = problem.leaves()
    y_TD = contender(problem, leaves)
    y_TD.backward(problem.dy_TD)
    gradients = {
        name: leaf.grad
        for name, leaf in zip(("dx", "dgates", "dw_up", "dw_down"), leaves, strict=True)
    }
    return {"y": y_TD.detach(), **gradients}


def errors(problem: Problem) -> dict[str, float]:
    """Return how far our output and gradients are from the loop's in float32, relative by norm."""
    got, want = results(ours, problem), results(torch_loop, problem.to(torch.float32))
    return {name: relative_error(got[name], want[name]) for name in want}


def output_error(contender: Contender, problem: Problem) -> float:
    """Return how far a contender's output is from ours, relative by norm."""
    with torch.no_grad():
        return relative_error(*(run(problem, problem.leaves()) for run in (contender, ours)))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference, relative to that of `want`."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def repeats_bit_for_bit(problem: Problem) -> bool:
    """Say whether two runs of ours give the same bits."""
    first, second = results(ours, problem), results(ours, problem)
    return all(torch.equal(first[name], second[name]) for name in first)


def replays_in_a_graph(problem: Problem, other: Problem) -> bool:
    """Capture forward and backward in a CUDA graph, replay it on other tokens and another routing.

    What is captured cannot wait for the GPU, so this shows that nothing does. The results must be
    those of a plain run, bit for bit.
    """
    leaves = problem.leaves()
    step = whole_step(ours, problem, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = ours(problem, leaves)
        y_TD.backward(problem.dy_TD)
    with torch.no_grad():
        problem.ids_TK.copy_(other.ids_TK)
        problem.dy_TD.copy_(other.dy_TD)
        for leaf, new in zip(leaves, other.leaves(), strict=True):
            leaf.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    want = results(ours, other)
    got = [y_TD, *(leaf.grad for leaf in leaves)]
    return all(torch.equal(a, b) for a, b in zip(got, want.values(), strict=True))
