"""The run: checks that must hold, then one table row a shape and contender."""

import argparse
import re
import time
from typing import NamedTuple

import infinity
import measure
import torch
import triton
from contenders import CONTENDERS, PEERS, Contender
from problem import SHAPES, TINY, Problem, Shape

_CHECKED = Shape("check", 2048, 512, 512, 16, 4)


def check(device: torch.device, dtype: torch.dtype, tolerance: float) -> bool:
    """Print and say whether ours is right, repeats bit for bit, and on a GPU replays in a graph."""
    shape = _CHECKED if device.type == "cuda" else TINY
    problem = Problem.make(shape, device, dtype)
    good = True
    neurons = infinity.LAYER if device.type == "cuda" else infinity.TINY
    errors = measure.errors(problem) | {"infinity": infinity.error(neurons, device, dtype)}
    for name, error in errors.items():
        good &= error <= tolerance
        print(f"error of {name:8} {error:.1e}  {'ok' if error <= tolerance else 'TOO LARGE'}")
    same = measure.repeats_bit_for_bit(problem)
    print(f"twice the same bits: {same}")
    good &= same
    if device.type == "cuda":
        other = Problem.make(shape, device, dtype)
        order = torch.randperm(shape.num_experts, device=device)
        other.ids_TK = order[other.ids_TK]
        replays = measure.replays_in_a_graph(problem, other)
        print(f"replays in a CUDA graph on another routing: {replays}")
        good &= replays
    return good


class Row(NamedTuple):
    """What one contender did on one shape."""

    shape: Shape
    name: str
    forward_ms: float
    both_ms: float
    saved: int
    error: float


class Bench:
    """Goes over shapes and contenders until the time is up."""

    def __init__(self, options: argparse.Namespace, deadline: float):
        self.options, self.deadline = options, deadline
        self.shapes = SHAPES
        if options.layer:
            sizes = zip("TDFEK", options.layer, strict=True)
            own = ", ".join(f"{letter} = {size}" for letter, size in sizes)
            self.shapes = (Shape(own, *options.layer),)
        self.rows: dict[tuple[str, str], Row] = {}
        self.notes: list[str] = []
        self.neurons = ""
        self.kept = ""
        if options.out and options.add and options.out.exists():
            self.kept = options.out.read_text()
        self.cublas = measure.cublas_tflops()
        print(f"{torch.cuda.get_device_name()}: cuBLAS {self.cublas:.0f} TFLOP/s", flush=True)

    def run(self) -> None:
        """Measure the neurons of infinity-MoE, then all shapes beside torch, then peers too.

        Peers come last, as some tune for minutes; then all take turns anew. The page is written
        after each shape.
        """
        parts = self.options.shapes or [""]
        if not self.options.layer and any(part.lower() in "infinity-moe" for part in parts):
            self.neurons = infinity.table(self.options.repeats)
        plain = [name for name in CONTENDERS if name not in PEERS]
        for names in (plain, [*plain, *PEERS]):
            for shape in self.shapes:
                if not any(part.lower() in shape.name.lower() for part in parts):
                    continue
                if time.monotonic() > self.deadline:
                    which = "not measured" if names == plain else "not measured beside peers"
                    self.note(f"{shape.name}: {which}, the time was up")
                    continue
                self.run_shape(shape, [n for n in names if n in (self.options.only or names)])
                torch.cuda.empty_cache()
                if self.options.out:
                    self.options.out.write_text(self.document())

    def run_shape(self, shape: Shape, names: list[str]) -> None:
        """Measure those that can run, in turns, unless all have been; then ours without turns."""
        problem = Problem.make(shape, torch.device("cuda"), torch.bfloat16)
        ready: dict[str, tuple[Contender, int, float]] = {}
        for name in names:
            contender = CONTENDERS[name]
            try:
                # The first runs compile and tune.
                measure.whole_step(contender, problem, problem.leaves())()
                saved = measure.saved_bytes(contender, problem)
                if name == "ours":  # also the forms that tuning took, at their own sizes
                    error = max(measure.errors(problem).values())
                else:
                    error = measure.output_error(contender, problem)
                ready[name] = (contender, saved, error)
            except Exception as error:  # a peer may fail in any way
                self.note(f"{shape.name}, {name}: {type(error).__name__}: {error}".splitlines()[0])
        if all((shape.name, name) in self.rows for name in ready):
            return
        leaves = problem.leaves()
        kinds = (measure.forward_step, measure.whole_step)
        forward, both = (
            measure.times_ms(
                {name: kind(entry[0], problem, leaves) for name, entry in ready.items()},
                self.options.repeats,
            )
            for kind in kinds
        )
        for name, (_, saved, error) in ready.items():
            row = Row(shape, name, forward[name], both[name], saved, error)
            self.rows[shape.name, name] = row
            print(self.line(row), flush=True)
        if "ours" in ready and len(ready) > 1:
            alone, all_alone = (
                measure.times_ms({"ours": kind(CONTENDERS["ours"], problem, leaves)}, 50)["ours"]
                for kind in kinds
            )
            self.note(
                f"{shape.name}, ours without turns: {alone:.2f} ms forward, {all_alone:.2f} both"
            )

    def note(self, text: str) -> None:
        """Keep and print what the table has no number for."""
        self.notes.append(text)
        print(text, flush=True)

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
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton "
            f"{triton.__version__}. bfloat16, random numbers and routing, the same for all;\n"
            f"contenders take turns, the L2 cache is cold, medians of {self.options.repeats}. "
            f"Sorting the slots is counted, the router is\nnot. A bfloat16 product of 8192^3 by "
            f"cuBLAS in the same run: {self.cublas:.0f} TFLOP/s. The error\nof ours is the largest "
            f"of output and gradients, against a float32 loop; that of others is of the\noutput, "
            f"against ours.\n\n"
            "| shape | contender | forward ms | TFLOP/s | forward and backward ms | TFLOP/s "
            "| of cuBLAS | saved MB | error |\n"
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        )
        rows = [self.line(row) for row in self.rows.values()]
        table = self.kept.split("\n## ")[0]
        for line in re.findall(r"^\| (?!shape |---).*$", table, re.MULTILINE):
            if tuple(line.strip("| ").split(" | ")[:2]) not in self.rows:
                rows.append(line)
        order = {shape.name: place for place, shape in enumerate(SHAPES)}
        rows.sort(key=lambda line: order.get(line.strip("| ").split(" | ")[0], len(order)))
        about = {note.split(":")[0] for note in self.notes}
        notes = self.notes + [
            note
            for note in re.findall(r"^- (.*)$", self.kept, re.MULTILINE)
            if note.split(":")[0] not in about
        ]
        neurons = self.neurons or "".join(re.findall(r"\n## .*", self.kept, re.DOTALL))
        listed = "".join(f"\n- {note}" for note in notes)
        return head + "\n".join(rows) + "\n" + (listed and f"{listed}\n") + neurons
