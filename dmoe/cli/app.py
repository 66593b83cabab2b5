"""The `dmoe` command: one function a verb, thin over the library.

With --json, the result is the only thing on stdout. Exit status: 0 good, 1 failed, 2 bad input.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dmoe.checkpoint import find_checkpoint, inspect_checkpoint, verify_checkpoint
from dmoe.checkpoint.neurons import convert_to_neurons
from dmoe.cli.evaluate import evaluate
from dmoe.cli.generate import generate_text
from dmoe.cli.options import AsJson, ConfigFile, Overrides, Trained, show
from dmoe.config import config_schema, config_tree, dump_yaml, load_config
from dmoe.data import prepare
from dmoe.train import exit_status
from dmoe.train import train as run_training
from dmoe.trainer.config import Config
from dmoe.trainer.doctor import doctor, render
from dmoe.trainer.estimate import estimate


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


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train in this process; for several, torchrun -m dmoe.train CONFIG [A.B=C]..."""
    run_training(load_config(config, overrides or ()))


app.command("eval")(evaluate)
app.command("generate")(generate_text)


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
    show(result.to_json(), as_json, lambda: Console().print(result.render()))


@app.command("doctor")
def check_machine(
    folder: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check versions, devices, communication and disk of this machine."""
    checks = doctor(folder)
    show(
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
    show(tree, as_json, lambda: print(dump_yaml(tree), end=""))


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

    show(manifest.model_dump(mode="json"), as_json, tell)


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

    show(value, as_json, tell)


@checkpoint_app.command("verify")
def verify(trained: Trained, as_json: AsJson = False) -> None:
    """Compare every byte of a checkpoint with its manifest; exit 1 if anything differs."""
    folder = find_checkpoint(trained)
    problems = [str(problem) for problem in verify_checkpoint(folder)]
    show(
        {"path": str(folder), "problems": problems},
        as_json,
        lambda: print(*(problems or [f"{folder} is intact"]), sep="\n"),
    )
    if problems:
        raise typer.Exit(1)


@checkpoint_app.command("to-neurons")
def to_neurons(
    trained: Trained,
    output: Annotated[Path, typer.Argument(help="New folder, for its checkpoints.", metavar="OUT")],
    as_json: AsJson = False,
) -> None:
    """Rewrite a model of infinite.granularity block as one of single neurons, equal in output."""
    folder = convert_to_neurons(trained, output)
    show({"path": str(folder)}, as_json, lambda: print(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""

    def run() -> int:
        try:
            app(args=argv)
        except SystemExit as end:  # Typer ends every command so, and has shown what was misused
            return int(end.code or 0)
        return 0

    return exit_status(run)
