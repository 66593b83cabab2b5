"""The `dmoe` command: one function a verb, thin over the library.

With --json, the result is the only thing on stdout. Exit status: 0 good, 1 failed, 2 bad input.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from pydantic import ValidationError
from rich.console import Console

from dmoe.checkpoint import (
    LoadedModel,
    find_checkpoint,
    inspect_checkpoint,
    load_model,
    verify_checkpoint,
)
from dmoe.config import ConfigError, ConfigModel, config_schema, config_tree, dump_yaml, load_config
from dmoe.data import build_valid_split, load_tokenizer, prepare
from dmoe.evaluation import evaluate_split
from dmoe.generation import SamplingConfig, generate
from dmoe.metrics.console import printable
from dmoe.train import exit_status
from dmoe.train import train as run_training
from dmoe.trainer.config import Config
from dmoe.trainer.doctor import doctor, render
from dmoe.trainer.estimate import estimate

Section = TypeVar("Section", bound=ConfigModel)


def _group(text: str) -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=text
    )


app = _group("Train Mixture-of-Experts language models.")
config_app = _group("Look at configurations.")
data_app = _group("Prepare text for training.")
checkpoint_app = _group("Look into checkpoints.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys to change: a.b=c ...", metavar="[A.B=C]...")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Trained = Annotated[
    Path, typer.Argument(help="Run folder or checkpoint folder.", metavar="RUN_OR_CHECKPOINT")
]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train in this process; for several, torchrun -m dmoe.train CONFIG [A.B=C]..."""
    run_training(load_config(config, overrides or ()))


@app.command("eval")
def evaluate(
    trained: Trained,
    overrides: Overrides = None,
    max_batches: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches to read; all if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and bits per byte on the held-out split, or on data.valid=..."""
    loaded, config = _load(trained, overrides or ())
    result = evaluate_split(
        loaded.model,
        build_valid_split(config.data, vocab_size=config.model.vocab_size),
        seq_len=config.train.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        mask_documents=config.data.mask_documents,
        max_batches=max_batches,
    )
    if not math.isfinite(result.loss):
        raise FloatingPointError(f"the held-out loss is {result.loss}: the weights are damaged")
    row = {
        "step": loaded.step,
        "k": config.model.moe.router.top_k if config.model.moe else None,
        "eval_loss": result.loss,
        "eval_perplexity": result.perplexity,
        "eval_bits_per_byte": result.bits_per_byte,
        "num_targets": result.num_targets,
    }
    _show([row], as_json, lambda: print(*(f"{key}={value}" for key, value in row.items())))


@app.command("generate")
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
    as_json: AsJson = False,
) -> None:
    """Continue prompts, all in one batch."""
    sampling = _validated(
        SamplingConfig,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    loaded, config = _load(trained)
    prompts = prompt or [sys.stdin.read()]
    results = generate(loaded.model, load_tokenizer(config.data.tokenizer), prompts, sampling)
    rows = [{"prompt": p, **asdict(r)} for p, r in zip(prompts, results, strict=True)]
    _show(rows, as_json, lambda: [print(printable(row["prompt"] + row["text"])) for row in rows])


@app.command("estimate")
def estimate_run(
    config: ConfigFile,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks; parallel.ep if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters, memory a rank and FLOPs a token, without building any weights."""
    result = estimate(load_config(config, overrides or ()), world)
    _show(result.to_json(), as_json, lambda: Console().print(result.render()))


@app.command("doctor")
def check_machine(
    folder: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check versions, devices, communication and disk of this machine."""
    checks = doctor(folder)
    _show(
        [asdict(check) for check in checks],
        as_json,
        lambda: Console().print(render(checks)),
    )
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


@config_app.command("show")
def show_config(
    config: ConfigFile,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="Check that so many ranks can run it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the whole resolved configuration, defaults included."""
    checked: Config = load_config(config, overrides or ())
    if world is not None:
        checked.check_world(world)
    tree = config_tree(checked)
    _show(tree, as_json, lambda: print(dump_yaml(tree), end=""))


@config_app.command("schema")
def show_schema() -> None:
    """Print the JSON schema of configuration files, for editors."""
    print(json.dumps(config_schema(), indent=2))


@data_app.command("prepare")
def prepare_data(
    inputs: Annotated[
        list[str],
        typer.Argument(help=".txt, .jsonl(.gz, .zst), .parquet, hf:NAME, or builtin:stdlib."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the token store.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or a tokenizer.json.")] = "bytes",
    holdout: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.01,
    text_key: Annotated[str, typer.Option(help="JSON key or column of the text.")] = "text",
    split_paragraphs: Annotated[
        bool, typer.Option(help="Blank lines part the documents of .txt files.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn text into a token store that training maps into memory."""
    manifest = prepare(
        inputs,
        output,
        tokenizer=tokenizer,
        holdout=holdout,
        text_key=text_key,
        split_paragraphs=split_paragraphs,
    )

    def tell() -> None:
        for name, split in manifest.splits.items():
            print(f"{output}: {name}: {split.documents} documents, {split.tokens} tokens")
        print(f"{manifest.skipped_documents} empty documents skipped")

    _show(manifest.model_dump(mode="json"), as_json, tell)


@checkpoint_app.command("inspect")
def inspect(trained: Trained, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds; only headers are read."""
    info = inspect_checkpoint(find_checkpoint(trained))
    value = {
        "path": str(info.path),
        "step": info.metadata.step,
        "eval_loss": info.metadata.eval_loss,
        "parts": info.metadata.parts,
        "bytes_by_kind": info.bytes_by_kind,
        "tensors": {name: asdict(tensor) for name, tensor in info.tensors.items()},
    }

    def tell() -> None:
        print(f"{info.path}: step {info.metadata.step}, eval_loss {info.metadata.eval_loss}")
        for kind, size in info.bytes_by_kind.items():
            print(f"{kind}: {size / 2**20:.1f} MiB")
        for name, tensor in info.tensors.items():
            print(f"{name} {list(tensor.shape)} {tensor.dtype}")

    _show(value, as_json, tell)


@checkpoint_app.command("verify")
def verify(trained: Trained, as_json: AsJson = False) -> None:
    """Compare every byte of a checkpoint with its manifest; exit 1 if anything differs."""
    folder = find_checkpoint(trained)
    problems = [str(problem) for problem in verify_checkpoint(folder)]
    _show(
        {"path": str(folder), "problems": problems},
        as_json,
        lambda: print(*(problems or [f"{folder} is intact"]), sep="\n"),
    )
    if problems:
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""

    def run() -> int:
        try:
            app(args=argv)
        except SystemExit as end:  # Typer ends every command so, and has shown what was misused
            return int(end.code or 0)
        return 0

    return exit_status(run)


def _load(trained: Path, overrides: Sequence[str] = ()) -> tuple[LoadedModel, Config]:
    """Load a model in the precision it was trained in, and the configuration of its run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(trained, device=device)
    return loaded, load_config(loaded.path / "config.yaml", overrides)


def _validated(section: type[Section], **values: Any) -> Section:
    """Build a section from command-line options, whose names are those of its keys."""
    try:
        return section(**values)
    except ValidationError as error:
        problems = [f"--{e['loc'][0]}: {e['msg']} (given: {e['input']})" for e in error.errors()]
        raise ConfigError("\n".join(problems).replace("_", "-")) from None


def _show(value: Any, as_json: bool, tell: Callable[[], Any]) -> None:
    if as_json:
        print(json.dumps(value))
    else:
        tell()
