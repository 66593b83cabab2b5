"""One model for every number of experts: Matryoshka MoE (arXiv 2509.26520) against specialists.

    pip install -e .[experiments]
    python tools/experiments/matryoshka.py all --out FOLDER [--data TEXT --title NAME]

`train` trains the arms of `matryoshka_arms.py` on one text and measures each at every k, first with
equal tokens, then with equal FLOPs; `speed` times a model against k; `report` writes
docs/results/matryoshka.md and its plot from what is in the folder, of all texts. What is there is
not made again: start the same command anew after an interruption.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from matryoshka_arms import ARMS, arm_config, steps_of
from matryoshka_report import write_report
from matryoshka_runs import Plan, is_done, perform, prepare_text
from matryoshka_speed import Settings, measure_speed

from dmoe.config import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ALL_ARMS = ",".join(ARMS)

Out = Annotated[Path, typer.Option(help="Folder of texts, runs and numbers.")]
Data = Annotated[
    Path | None, typer.Option(help="A .txt file or a folder of such; the built-in corpus if none.")
]
Title = Annotated[str | None, typer.Option(help="What the report calls the text.")]
Seeds = Annotated[str, typer.Option(help="Numbers, with commas.")]
Arms = Annotated[str, typer.Option(help="Names, with commas.")]
Matches = Annotated[str, typer.Option(help="Tables: tokens, flops, or both with a comma.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Of the reference; as in the YAML if none.")]
EvalTokens = Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of a run, or of the timed model.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds that count.")]
Clock = Annotated[
    Literal["wall", "cpu"],
    typer.Option(help="CPU time of the process is the fairer one where others use the machine."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Changes for all arms.")
]


@app.command()
def train(
    out: Out,
    data: Data = None,
    title: Title = None,
    seeds: Seeds = "0,1,2",
    arms: Arms = ALL_ARMS,
    match: Matches = "tokens,flops",
    steps: Steps = None,
    eval_tokens: EvalTokens = 40_000,
    jobs: Jobs = 2,
    threads: Threads = 1,
    overrides: Overrides = None,
) -> None:
    """Train the arms on a text and measure them."""
    folder, of_text = prepare_text(out, data, title)
    everywhere = (*(overrides or ()), *of_text)
    arm_names = _names(arms, ARMS)
    reference_steps = steps or arm_config("layer", everywhere).train.steps
    plans = []
    for kind in _names(match, ("tokens", "flops")):
        for seed in map(int, seeds.split(",")):
            for arm in arm_names:
                num_steps = steps_of(arm, reference_steps, kind, everywhere)
                if kind == "flops" and num_steps == reference_steps:
                    continue  # as many FLOPs with as many tokens: the first table has it
                plans.append(Plan(folder, arm, seed, kind, num_steps, eval_tokens, everywhere))
    _perform_all([plan for plan in plans if not is_done(plan)], jobs, threads)


@app.command()
def speed(out: Out, rounds: Rounds = 25, threads: Threads = 1, clock: Clock = "wall") -> None:
    """Time inference against k, and a training step with elastic k against one with fixed k."""
    torch.set_num_threads(threads)
    measure_speed(out / "speed.json", Settings(rounds, threads, clock))


@app.command()
def report(out: Out) -> None:
    """Write the page and the plot from the numbers of all texts in the folder."""
    print(write_report(out))


@app.command("all")
def everything(
    out: Out,
    data: Data = None,
    title: Title = None,
    seeds: Seeds = "0,1,2",
    jobs: Jobs = 2,
) -> None:
    """Train, time and report."""
    train(out, data, title, seeds, jobs=jobs)
    speed(out)
    report(out)


def _perform_all(plans: list[Plan], jobs: int, threads: int) -> None:
    """Perform plans in processes of their own; what fails is told, and the others go on."""
    began, failed = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _set_up, (threads,)) as pool:
        futures: dict[Future[None], Plan] = {pool.submit(perform, plan): plan for plan in plans}
        for number, future in enumerate(as_completed(futures), start=1):
            error, minutes = future.exception(), (time.monotonic() - began) / 60
            failed += error is not None
            state = f"failed: {error!r}" if error else "done"
            name = futures[future].name
            print(f"{number}/{len(plans)} {name} {state} ({minutes:.1f} min)", flush=True)
    if failed:
        print(f"{failed} runs failed; the same command makes them again", file=sys.stderr)
        raise typer.Exit(1)


def _set_up(threads: int) -> None:
    """Prepare a process: all runs are on the CPU, also where there is a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(threads)


def _names(given: str, known: Collection[str]) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    try:
        app()
    except ConfigError as error:
        sys.exit(f"error: {error}")
