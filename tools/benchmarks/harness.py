"""Paired timing and the results page; the benchmark scripts beside this file share it.

Contenders are interleaved within every round, so that what disturbs the machine disturbs all of
them, and ratios are medians over the rounds' own ratios.
"""

import argparse
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from dmoe.parallel import tune_host_memory

RESULTS = Path(__file__).parents[2] / "docs" / "results"
"""Each processor has a page of its own there."""
WARM_UP_ROUNDS = 2


class Settings(NamedTuple):
    """How to measure."""

    rounds: int
    threads: int
    clock: str
    """"wall" time, or "cpu" time of the process: the fairer one, with one thread, on a machine that
    others use as well."""

    def describe(self) -> str:
        """Return the settings in words."""
        return f"{self.threads} threads, {self.clock} time, medians over {self.rounds} rounds"


def parse_settings(docstring: str | None) -> Settings:
    """Read the command line, and prepare this process."""
    parser = argparse.ArgumentParser(description=docstring)
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    settings = Settings(**vars(parser.parse_args()))
    prepare(settings)
    return settings


def prepare(settings: Settings) -> None:
    """Set the number of threads, and take memory as training does; before the first tensor."""
    tune_host_memory()
    torch.set_num_threads(settings.threads)


def measure(
    contenders: dict[str, Callable[[], object]], settings: Settings
) -> dict[str, list[float]]:
    """Return the milliseconds of each contender in each round."""
    clock = time.perf_counter if settings.clock == "wall" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(WARM_UP_ROUNDS + settings.rounds):
        for name, run in contenders.items():
            start = clock()
            run()
            if round_ >= WARM_UP_ROUNDS:
                times[name].append(1e3 * (clock() - start))
    return times


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median over the rounds of `times` / `reference`."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def report(name: str, intro: str, header: Sequence[str], rows: list[list[str]], **at: str) -> None:
    """Print aligned lines, and write the section `name` of this processor's page.

    Args:
        name: title of the section, which replaces the one of an earlier run.
        intro: what was measured.
        header: titles of the columns.
        rows: cells of each line.
        at: settings and peers to be named beside the machine.
    """
    table = [list(header), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    where = "; ".join([f"{date.today()}", machine(), *at.values()])
    section = "\n".join([f"## {name}", "", intro, "", where + ".", "", *lines, ""])
    print(section)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / page_name(_processor())
    page = path.read_text() if path.exists() else f"# CPU benchmarks: {_processor()}\n"
    title, *sections = page.split("\n## ")
    kept = [old for old in sections if old.splitlines()[0] != name]
    sections = sorted([*kept, section.removeprefix("## ")])
    path.write_text("\n\n## ".join(part.strip() for part in [title, *sections]) + "\n")


def page_name(processor: str) -> str:
    """Return the name of a processor's page, such as cpu_amd_epyc.md."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)|processor|cpu", " ", processor.lower()))
    return f"cpu_{'_'.join(words)}.md"


def machine() -> str:
    """Return processor, cores and load, and the versions of Python and torch."""
    load = os.getloadavg()[0]
    return (
        f"{_processor()}, {os.cpu_count()} cores, load {load:.1f} at the end; "
        f"python {platform.python_version()}, torch {torch.__version__}"
    )


def peer_version(package: str) -> str:
    """Return the package and its version, or that it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
