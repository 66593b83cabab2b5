"""`dmoe eval`: measures a trained model, at several numbers of experts per token, one row each.

It also searches the numbers that cost the least loss within a budget, and compares routers and
experts. The model is loaded once; bad options are refused before.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from dmoe.cli.options import (
    AsJson,
    Overrides,
    Trained,
    numbers_of_samples,
    show,
    whole_numbers,
)
from dmoe.cli.search import Search, default_k_max
from dmoe.cli.trained import GateThreshold, TrainedRun, open_run
from dmoe.config import ConfigError
from dmoe.data import MicroBatch, TokenSplit, build_valid_split, eval_batches
from dmoe.evaluation import evaluate_split, expert_similarity, router_agreement
from dmoe.evaluation.similarity import check_two_experts
from dmoe.models import ModelConfig
from dmoe.models.k_profile import BudgetUnit, load_k_profile

Row = dict[str, Any]
Use = tuple[int | Sequence[int] | None, Row]
"""Experts per token (None for the router's own), and what else the row says of them."""

_FEW = 4
"""Micro-batches of a comparison, where --max-batches does not say."""


def evaluate(
    trained: Trained,
    overrides: Overrides = None,
    k: Annotated[
        str | None, typer.Option(help="Experts per token in every layer: 1,2,4 gives three rows.")
    ] = None,
    profile: Annotated[
        list[Path] | None, typer.Option(help="k_profile.yaml; may be repeated, a row each.")
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(help="Draws from a continuous space of experts, or its mean: 1,2,mean."),
    ] = None,
    threshold: GateThreshold = 0.0,
    budget: Annotated[
        float | None,
        typer.Option(help="Search the experts per token of each layer within this budget."),
    ] = None,
    budget_unit: Annotated[
        BudgetUnit,
        typer.Option(help="Of the budget: sum over layers, FLOPs a token, seconds a pass."),
    ] = "experts",
    k_max: Annotated[
        int | None,
        typer.Option(help="Most experts of a layer in the search; as in training if not given."),
    ] = None,
    swaps: Annotated[int, typer.Option(min=0, help="Swaps that the search measures.")] = 8,
    calibration_batches: Annotated[
        int, typer.Option(min=1, help="Micro-batches of training text that the search reads.")
    ] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Where the search writes; RUN/k_profile.yaml if not given.")
    ] = None,
    agreement: Annotated[
        str | None, typer.Option(help="Compare the routers' rankings at two k, such as 1,4.")
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Compare what the experts of a layer make.")
    ] = False,
    max_batches: Annotated[
        int | None,
        typer.Option(min=1, help="Micro-batches to read; all if not given, 4 to compare."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and bits per byte on the held-out split, or on data.valid=..."""
    run = open_run(trained, overrides or ())
    model = run.config.model
    uses = _uses(model, k, profile or []) + _sampled(model, samples)
    model.check_gate_threshold(threshold)
    pair = None if agreement is None else _pair(model, agreement)
    if similarity:
        check_two_experts(model)
    search = None
    if budget is not None:
        search = Search(
            run,
            budget=budget,
            unit=budget_unit,
            k_max=k_max if k_max is not None else default_k_max(model),
            num_swaps=swaps,
            num_batches=calibration_batches,
            output=output or run.run_folder / "k_profile.yaml",
        )
    elif k_max is not None or output is not None:
        raise ConfigError("--k-max and --output belong to a search: give --budget as well")
    if not (uses or search or pair or similarity):
        uses = [(None, {})]

    measurements = _Measurements(run, threshold, max_batches)
    rows = [measurements.loss(use) for use in uses]
    if search is not None:
        found, said = search(measurements.loaded)
        rows.append(measurements.loss((found.k, said)))
    if pair is not None:
        rows.append(measurements.agreement(*pair))
    if similarity:
        rows.append(measurements.similarity())
    show(rows, as_json, lambda: [print(_line(row)) for row in rows])


class _Measurements:
    """Rows about one loaded model."""

    def __init__(self, run: TrainedRun, threshold: float, max_batches: int | None):
        self.loaded = run.load(threshold)
        self._config, self._threshold, self._max_batches = run.config, threshold, max_batches

    @cached_property
    def _split(self) -> TokenSplit:
        return build_valid_split(self._config.data, vocab_size=self._config.model.vocab_size)

    def loss(self, use: Use) -> Row:
        """Evaluate the held-out split."""
        (k, said), config = use, self._config
        self.loaded.model.set_samples(said.get("samples"))
        with self.loaded.model.at_k(k):
            result = evaluate_split(
                self.loaded.model,
                self._split,
                seq_len=config.train.seq_len,
                micro_batch_size=config.train.micro_batch_size,
                mask_documents=config.data.mask_documents,
                max_batches=self._max_batches,
            )
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"the held-out loss is {result.loss}: the weights are damaged")
        row = {
            "step": self.loaded.step,
            "k": _own_k(config.model) if k is None else k,
            "k_mean": result.k_mean,
            "eval_loss": result.loss,
            "eval_perplexity": result.perplexity,
            "eval_bits_per_byte": result.bits_per_byte,
            "num_targets": result.num_targets,
        }
        if self._threshold:
            row["gate_threshold"] = self._threshold
        return row | said

    def agreement(self, k: int, other_k: int) -> Row:
        """Compare the routers at two numbers of experts per token."""
        of_layers = router_agreement(self.loaded.model, self._few_batches(), k, other_k)
        return {
            "step": self.loaded.step,
            "agreement_k": [k, other_k],
            "agreement": sum(of_layers) / len(of_layers),
            "agreement_of_layers": of_layers,
        }

    def similarity(self) -> Row:
        """Compare the experts of each layer."""
        of_layers = expert_similarity(self.loaded.model, self._few_batches())
        return {
            "step": self.loaded.step,
            "expert_similarity": sum(of_layers) / len(of_layers),
            "expert_similarity_of_layers": of_layers,
        }

    def _few_batches(self) -> Iterator[MicroBatch]:
        config = self._config
        return eval_batches(
            self._split,
            seq_len=config.train.seq_len,
            micro_batch_size=config.train.micro_batch_size,
            vocab_size=config.model.vocab_size,
            mask_documents=config.data.mask_documents,
            max_batches=self._max_batches or _FEW,
        )


def _uses(model: ModelConfig, k: str | None, profiles: Sequence[Path]) -> list[Use]:
    """Return a use for each number of `--k` and each `--profile`, checked against the model."""
    numbers = [] if k is None else whole_numbers("--k", k)
    for number in numbers:
        model.k_of_layers(number)
    uses: list[Use] = [(number, {}) for number in numbers]
    return uses + [(load_k_profile(path, model).k, {"profile": str(path)}) for path in profiles]


def _sampled(model: ModelConfig, samples: str | None) -> list[Use]:
    """Return a use for each number of `--samples`, checked against the model."""
    numbers = [] if samples is None else numbers_of_samples(samples)
    for number in numbers:
        model.check_samples(number)
    return [(None, {"samples": number}) for number in numbers]


def _pair(model: ModelConfig, agreement: str) -> tuple[int, int]:
    """Return the two numbers of `--agreement`, checked against the model."""
    numbers = whole_numbers("--agreement", agreement)
    if len(numbers) != 2:
        raise ConfigError(f"--agreement: {agreement!r} is not two numbers of experts, such as 1,4")
    for number in numbers:
        model.k_of_layers(number)
    return numbers[0], numbers[1]


def _own_k(model: ModelConfig) -> int | None:
    return model.moe.used_router.fixed_k if model.moe else None


def _line(row: Row) -> str:
    return " ".join(f"{key}={_plain(value)}" for key, value in row.items())


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value))
    return str(value)
