"""The run: checks that must hold, then one table row a shape and contender."""

import argparse
import os
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import infinity
import measure
import torch
import triton
from contenders import CONTENDERS, PEERS, TOLERANCES, runs_here
from dmoe_kernels.configs import tuned
from problem import SHAPES, TINY, Problem, Shape

_CHECKED = Shape("check", 2048, 512, 512, 16, 4)


def check(device: torch.device, dtype: torch.dtype, tolerance: float) -> bool:
    """Print and say whether ours is right, repeats bit for bit, and on a GPU replays in a graph."""
    shape = _CHECKED if device.type == "cuda" else TINY
    problem = Problem.make(shape, device, dtype)
    good = True
    neurons = infinity.LAYER if device.type == "cuda" else infinity.TINY
    errors = measure.errors(problem) | {
        "layer": measure.layer_error(problem),
        "infinity": infinity.error(neurons, device, dtype),
    }
    for name, error in errors.items():
        good &= error <= tolerance
        print(f"error of {name:8} {error:.1e}  {'ok' if error <= tolerance else 'TOO LARGE'}")
    same = measure.repeats_bit_for_bit(problem)
    print(f"twice the same bits: {same}")
    good &= same
    if device.type == "cuda":
        other = Problem.make(shape, device, dtype, seed=1)
        replays = measure.replays_in_a_graph(problem, other)
        print(f"a layer replays in a CUDA graph on other tokens and another routing: {replays}")
        good &= replays
    return good


def prepare(name: str, problem: Problem) -> tuple[int, float]:
    """Return what a contender saves, and its error; the first runs compile and tune."""
    contender = CONTENDERS[name]
    measure.whole_step(contender, problem, problem.leaves())()
    saved = measure.saved_bytes(contender, problem)
    if name == "ours":  # also the forms that tuning took, at their own sizes
        return saved, max(measure.errors(problem).values())
    return saved, measure.output_error(contender, problem)


class Row(NamedTuple):
    """What one contender did on one shape."""

    shape: Shape
    name: str
    forward_ms: float
    both_ms: float
    saved: int
    error: float


class Bench:
    """Goes over shapes and contenders; `stop` may end the process at any time."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.names = [name for name in CONTENDERS if name in (options.only or CONTENDERS)]
        self.shapes = SHAPES
        if options.layer:
            sizes = zip("TDFEK", options.layer, strict=True)
            own = ", ".join(f"{letter} = {size}" for letter, size in sizes)
            self.shapes = (Shape(own, *options.layer),)
        self.good = True
        self.running, self.must = "the rate of cuBLAS", False
        self.rows: dict[tuple[str, str], Row] = {}
        self.notes: list[str] = []
        self.neurons = ""
        self.kept = ""
        if options.out and options.add and options.out.exists():
            self.kept = options.out.read_text()
        self.writing = threading.Lock()
        self.device = torch.cuda.get_device_name()
        self.cublas = measure.cublas_tflops()
        print(f"{self.device}: cuBLAS {self.cublas:.0f} TFLOP/s", flush=True)

    def run(self) -> None:
        """Measure all shapes beside torch, then the neurons of infinity-MoE, then beside each peer.

        Peers come last, one after the other, as some tune for minutes. The page is written after
        each shape.
        """
        here = [name for name in self.names if runs_here(name)]
        if len(here) < len(self.names):
            absent = [name for name in self.names if name not in here]
            self.note(f"not run, as the package or the GPU does not have it: {', '.join(absent)}")
        parts = [part.lower() for part in self.options.shapes or [""]]
        shapes = [shape for shape in self.shapes if any(p in shape.name.lower() for p in parts)]
        plain = [name for name in here if name not in PEERS]
        for shape in shapes:
            self.attempt(shape.name, self.run_shape, shape, plain, must=True)
            self.write()
        if not self.options.layer and any(part in "infinity-moe" for part in parts):
            table = self.attempt("infinity-MoE", infinity.table, self.options.repeats, must=True)
            self.neurons = table or ""
            self.write()
        for peer in (name for name in PEERS if name in here):
            for shape in shapes:
                self.attempt(f"{shape.name}, {peer}", self.run_shape, shape, [peer])
                self.write()

    def run_shape(self, shape: Shape, names: list[str]) -> None:
        """Measure contenders in turns with those that have been before, but not the slow loop."""
        torch.cuda.empty_cache()
        problem = Problem.make(shape, torch.device("cuda"), torch.bfloat16)
        ready: dict[str, tuple[int, float]] = {}
        for name in names:
            what, must = f"{shape.name}, {name}", name in TOLERANCES
            numbers = self.attempt(what, prepare, name, problem, must=must)
            if numbers:
                ready[name] = numbers
            if numbers and must and numbers[1] > TOLERANCES[name]:
                self.good = False
                self.note(f"{what}: the error {numbers[1]:.1e} is too large")
        if not ready:  # no peer works at this shape: nothing is done anew
            return
        for (at, name), row in self.rows.items():
            if at == shape.name and name != "torch loop":
                ready[name] = (row.saved, row.error)
        self.running, self.must = f"{shape.name}, turns of {', '.join(ready)}", False
        forward, both = self.times(problem, list(ready))
        for name, (saved, error) in ready.items():
            row = Row(shape, name, forward[name], both[name], saved, error)
            self.rows[shape.name, name] = row
            print(self.line(row), flush=True)
        if "ours" in names and "ours" in ready and len(ready) > 1:
            alone, all_alone = (times["ours"] for times in self.times(problem, ["ours"]))
            self.note(
                f"{shape.name}, ours without turns: {alone:.2f} ms forward, {all_alone:.2f} both"
            )

    def times(self, problem: Problem, names: list[str]) -> list[dict[str, float]]:
        """Return the milliseconds of each contender forward, then forward and backward."""
        leaves = problem.leaves()
        return [
            measure.times_ms(
                {name: kind(CONTENDERS[name], problem, leaves) for name in names},
                self.options.repeats,
            )
            for kind in (measure.forward_step, measure.whole_step)
        ]

    def attempt(
        self, what: str, call: Callable[..., Any], *arguments: Any, must: bool = False
    ) -> Any:
        """Call, and note what it raises; the command fails if it must not raise, nor be stopped."""
        self.running, self.must = what, must
        try:
            return call(*arguments)
        except Exception as error:  # a peer may fail in any way
            self.note(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
            self.good &= not must

    def note(self, text: str) -> None:
        """Keep and print what the table has no number for."""
        self.notes.append(text)
        print(text, flush=True)

    def write(self) -> None:
        """Write the page as it stands."""
        with self.writing:
            if self.options.out:
                whole = self.options.out.with_name(f"{self.options.out.name}.part")
                whole.write_text(self.document())
                whole.replace(self.options.out)

    def stop(self) -> None:
        """Write the page and end the process, whatever runs; called by a timer's thread."""
        try:
            self.note(f"{self.running}: the time was up here, what comes after was not measured")
            self.write()
        finally:
            os._exit(int(self.must or not self.good))

    def num_tuned(self) -> int:
        """Return how many products of some size have a tile shape that was measured here."""
        return len(tuned(torch.device("cuda")))

    def line(self, row: Row) -> str:
        """Return a row of the table."""
        forward = row.shape.forward_flop / row.forward_ms / 1e9
        both = 3 * row.shape.forward_flop / row.both_ms / 1e9
        return (
            f"| {row.shape.name} | {row.name} | {row.forward_ms:.2f} | {forward:.0f} "
            f"| {row.both_ms:.2f} | {both:.0f} | {both / self.cublas:.0%} "
            f"| {row.saved / 1e6:.0f} | {row.error:.1e} |"
        )

    def document(self) -> str:
        """Return the page, with the rows and sections of the page before that are not made anew."""
        head = (
            f"# Kernels on a GPU\n\n<!-- Written by `python kernels/bench`: do not edit. -->\n\n"
            f"{self.device}, torch {torch.__version__}, Triton {triton.__version__}. bfloat16, "
            f"random numbers and routing, the same for all;\ncontenders take turns, the L2 cache "
            f"is cold, medians of {self.options.repeats} runs, or of as many as take "
            f"{measure.SECONDS:g} s, but not below {measure.FEWEST}.\nThe loop took its turns "
            f"before peers came. Sorting the slots is counted, the router is not. A bfloat16 "
            f"product\nof 8192^3 by cuBLAS in the same run: {self.cublas:.0f} TFLOP/s. The error "
            f"of ours is the largest of output and gradients,\nagainst a float32 loop; that of "
            f"others is of the output, against ours. Of tile shapes, {self.num_tuned()} had been\n"
            f"tuned, all others were the first that fit.\n\n"
            "| shape | contender | forward ms | TFLOP/s | forward and backward ms | TFLOP/s "
            "| of cuBLAS | saved MB | error |\n"
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        )
        # Copied, as the timer's thread may come here while rows are added.
        rows = [self.line(row) for row in list(self.rows.values())]
        table = self.kept.split("\n## ")[0]
        for line in re.findall(r"^\| (?!shape |---).*$", table, re.MULTILINE):
            if tuple(line.strip("| ").split(" | ")[:2]) not in self.rows:
                rows.append(line)
        order = {shape.name: place for place, shape in enumerate(SHAPES)}
        rows.sort(key=lambda line: order.get(line.strip("| ").split(" | ")[0], len(order)))
        about = {", ".join(key) for key in list(self.rows)}
        about |= {note.split(":")[0] for note in self.notes}
        notes = self.notes + [
            note
            for note in re.findall(r"^- (.*)$", self.kept, re.MULTILINE)
            if note.split(":")[0] not in about
        ]
        neurons = self.neurons or "".join(re.findall(r"\n## .*", self.kept, re.DOTALL))
        listed = "".join(f"\n- {note}" for note in notes)
        return head + "\n".join(rows) + "\n" + (listed and f"{listed}\n") + neurons
