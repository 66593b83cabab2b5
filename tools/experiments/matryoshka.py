"""One model for every number of experts: Matryoshka MoE (arXiv 2509.26520) against specialists.

    pip install -e .[experiments]
    python tools/experiments/matryoshka.py all --out FOLDER [--data TEXT --title NAME]

`train` trains the arms of `matryoshka_arms.py` on one text and measures each at every k, first with
equal tokens, then with equal FLOPs; `speed` times a model against k; `report` writes
docs/results/matryoshka.md and its plot from what is in the folder, of all texts. What is there is
not made again: start the same command anew after an interruption.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from experiment_runs import names_of, perform_all, prepare_text
from matryoshka_arms import ARMS, arm_config, steps_of
from matryoshka_report import write_report
from matryoshka_runs import MatryoshkaPlan, measure
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
    folder, of_text = prepare_text(out, data, title, lambda more: arm_config("k1", more))
    everywhere = (*(overrides or ()), *of_text)
    arm_names = names_of(arms, ARMS)
    reference_steps = steps or arm_config("layer", everywhere).train.steps
    plans = []
    for kind in names_of(match, ("tokens", "flops")):
        for seed in map(int, seeds.split(",")):
            for arm in arm_names:
                num_steps = steps_of(arm, reference_steps, kind, everywhere)
                if kind == "flops" and num_steps == reference_steps:
                    continue  # as many FLOPs with as many tokens: the first table has it
                plans.append(
                    MatryoshkaPlan(folder, arm, seed, num_steps, eval_tokens, everywhere, kind)
                )
    perform_all(plans, measure, jobs, threads)


@app.command()
def speed(out: Out, rounds: Rounds = 25, threads: Threads = 1, clock: Clock = "wall") -> None:
    """Time inference against k, and a training step with elastic k against one with fixed k."""
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


if __name__ == "__main__":
    try:
        app()
    except ConfigError as error:
        sys.exit(f"error: {error}")
