"""A continuous space of experts: infinity-MoE (arXiv 2601.17680) against dense models and top-k.

    pip install -e .[experiments]
    python tools/experiments/infinite.py all --out FOLDER [--data TEXT --title NAME]

`train` trains the arms of `infinite_arms.py` on one text and measures each at every number of
samples; `speed` times the layers and a training step of each arm; `report` writes
docs/results/infinite.md and its plot from what is in the folder, of all texts. What is there is
not made again: start the same command anew after an interruption.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from experiment_runs import names_of, perform_all, prepare_text
from infinite_arms import ARMS, arm_config, arms_of
from infinite_report import write_report
from infinite_runs import InfinitePlan, measure
from infinite_speed import Settings, measure_speed

from dmoe.config import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ALL_ARMS = ",".join(ARMS)

Out = Annotated[Path, typer.Option(help="Folder of texts, runs and numbers.")]
Data = Annotated[
    Path | None, typer.Option(help="A .txt file or a folder of such; the built-in corpus if none.")
]
Title = Annotated[str | None, typer.Option(help="What the report calls the text.")]
Seeds = Annotated[
    str, typer.Option(help="Numbers, with commas, of the arms with equal parameters.")
]
OtherSeeds = Annotated[str, typer.Option(help="The same of the other arms.")]
Arms = Annotated[str, typer.Option(help="Names, with commas.")]
Steps = Annotated[int | None, typer.Option(min=1, help="As in the YAML if none.")]
EvalTokens = Annotated[int, typer.Option(min=1, help="Held-out tokens of the sweeps.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of a run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Changes for all arms.")
]


@app.command()
def train(
    out: Out,
    data: Data = None,
    title: Title = None,
    seeds: Seeds = "0,1,2",
    other_seeds: OtherSeeds = "0",
    arms: Arms = ALL_ARMS,
    steps: Steps = None,
    eval_tokens: EvalTokens = 32_768,
    jobs: Jobs = 2,
    threads: Threads = 1,
    overrides: Overrides = None,
) -> None:
    """Train the arms on a text and measure them."""
    folder, of_text = prepare_text(out, data, title, lambda more: arm_config("dense_active", more))
    everywhere = (*(overrides or ()), *of_text)
    num_steps = steps or arm_config("dense_active", everywhere).train.steps
    names = names_of(arms, ARMS)
    compared = [name for name in names if name in arms_of("compared")]
    runs = [(name, seed) for seed in seeds.split(",") for name in compared]
    runs += [
        (name, seed) for seed in other_seeds.split(",") for name in names if name not in compared
    ]
    plans = [
        InfinitePlan(folder, name, int(seed), num_steps, eval_tokens, everywhere)
        for name, seed in runs
    ]
    perform_all(plans, measure, jobs, threads)


@app.command()
def speed(
    out: Out,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a step.")] = 1,
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(help="CPU time is the fairer one where others use the machine."),
    ] = "wall",
) -> None:
    """Time a training step of every arm."""
    measure_speed(out / "speed.json", Settings(rounds, threads, clock))


@app.command()
def report(out: Out) -> None:
    """Write the page and the plot from the numbers of all texts in the folder."""
    print(write_report(out))


@app.command("all")
def everything(
    out: Out, data: Data = None, title: Title = None, seeds: Seeds = "0,1,2", jobs: Jobs = 2
) -> None:
    """Train, time and report."""
    train(out, data, title, seeds, jobs=jobs)
    speed(out)
    report(out)


if __name__ == "__main__":
    try:
        app()
    except ConfigError as error:
        sys.exit(f"error: {error}")
