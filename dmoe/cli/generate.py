"""`dmoe generate`: continues prompts with a trained model, at any number of experts per token."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dmoe.cli.options import (
    AsJson,
    Trained,
    numbers_of_samples,
    show,
    validated,
    whole_numbers,
)
from dmoe.cli.trained import GateThreshold, open_run
from dmoe.config import ConfigError
from dmoe.data import load_tokenizer
from dmoe.generation import SamplingConfig, generate
from dmoe.metrics.console import printable
from dmoe.models import ModelConfig
from dmoe.models.k_profile import load_k_profile
from dmoe.moe import Samples


def generate_text(
    trained: Trained,
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be repeated; without any, standard input is read.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from this share of probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    k: Annotated[
        str | None,
        typer.Option(help="Experts per token: 2, or 4,4,2,1 with a number for each MoE layer."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="k_profile.yaml with a number for each MoE layer.")
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(help="Draws from a continuous space of experts for each token, or mean."),
    ] = None,
    threshold: GateThreshold = 0.0,
    as_json: AsJson = False,
) -> None:
    """Continue prompts, all in one batch."""
    sampling = validated(
        SamplingConfig,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    run = open_run(trained)
    k_L = _k_of_layers(run.config.model, k, profile)
    number = _number_of_samples(run.config.model, samples)
    run.config.model.check_gate_threshold(threshold)
    loaded = run.load(threshold)
    loaded.model.set_k(k_L)
    loaded.model.set_samples(number)
    prompts = prompt or [sys.stdin.read()]
    results = generate(loaded.model, load_tokenizer(run.config.data.tokenizer), prompts, sampling)
    rows = [{"prompt": p, **asdict(r)} for p, r in zip(prompts, results, strict=True)]
    show(rows, as_json, lambda: [print(printable(row["prompt"] + row["text"])) for row in rows])


def _k_of_layers(model: ModelConfig, k: str | None, profile: Path | None) -> tuple[int, ...] | None:
    """Return what `--k` or `--profile` says; None for the router's own."""
    if k is not None and profile is not None:
        raise ConfigError("--k and --profile both say how many experts a token has: give one")
    if profile is not None:
        return load_k_profile(profile, model).k
    if k is None:
        return None
    numbers = whole_numbers("--k", k)
    return model.k_of_layers(numbers[0] if len(numbers) == 1 else numbers)


def _number_of_samples(model: ModelConfig, samples: str | None) -> Samples | None:
    """Return what `--samples` says, checked against the model; None for the model's own."""
    if samples is None:
        return None
    numbers = numbers_of_samples(samples)
    if len(numbers) != 1:
        raise ConfigError(f"--samples: {samples!r} is {len(numbers)} numbers: give one")
    model.check_samples(numbers[0])
    return numbers[0]
