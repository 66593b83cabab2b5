"""Claims of the classical mixtures of experts, 1991 to 2021, measured on small tasks.

    python tools/experiments/classics.py train --out runs/classics
    python tools/experiments/classics.py report --out runs/classics

`train` appends a line a run to OUT/tuning.jsonl, OUT/mixtures.jsonl and OUT/language.jsonl and
skips what is there, so it can be stopped and started again; `report` writes
docs/results/classics.md. Language runs are of bytes of Python's standard library; their arms are in
`classics_arms.py`.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import classics_mixtures
import classics_runs
import torch
import typer
from classics_arms import ARMS, BASE, SEEDS
from classics_report import PAGE, write_report
from experiment_texts import texts_table

from dmoe.config import load_config

Json = dict[str, Any]
Out = Annotated[Path, typer.Option(help="Folder of runs and numbers.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, help="Of each arm.")] = len(SEEDS),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Changes for language arms.")
    ] = None,
) -> None:
    """Train everything, one seed after the other, in one thread."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for system in classics_mixtures.SYSTEMS:
        for setting in classics_mixtures.settings_of(system):
            _once(
                out / "tuning.jsonl",
                {"system": system, **setting._asdict()},
                partial(classics_mixtures.tune, system, setting),
            )
        setting = classics_mixtures.best_setting(system, _rows(out / "tuning.jsonl"))
        for seed in list(classics_mixtures.SEEDS)[: None if seeds >= len(SEEDS) else seeds]:
            _once(
                out / "mixtures.jsonl",
                {"system": system, "seed": seed},
                partial(classics_mixtures.perform, system, seed, setting),
            )
    for seed in SEEDS[:seeds]:
        for group, arms in ARMS.items():
            for arm in arms:
                _once(
                    out / "language.jsonl",
                    {"group": group, "arm": arm, "seed": seed},
                    partial(classics_runs.perform, group, arm, seed, out, overrides or []),
                )


@app.command()
def report(out: Out, page: Annotated[Path, typer.Option(help="Where to write.")] = PAGE) -> None:
    """Write the page of all runs that are there."""
    sources = load_config(BASE, []).data.sources
    texts = texts_table({source.path.removeprefix("builtin:"): source.path for source in sources})
    mixtures, language = _rows(out / "mixtures.jsonl"), _rows(out / "language.jsonl")
    print(write_report(mixtures, language, page, texts=texts))


def _once(path: Path, key: Json, perform: Callable[[], Json]) -> None:
    """Perform a run unless the file has its line."""
    if any(row.items() >= key.items() for row in _rows(path)):
        return
    row = perform()
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(", ".join(map(str, key.values())), flush=True)


def _rows(path: Path) -> Sequence[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    app()
