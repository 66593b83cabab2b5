"""What the verbs of the command share: arguments, checks of options, output."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from dmoe.config import ConfigError, ConfigModel
from dmoe.moe import Samples

Section = TypeVar("Section", bound=ConfigModel)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys to change: a.b=c ...", metavar="[A.B=C]...")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Trained = Annotated[
    Path, typer.Argument(help="Run folder or checkpoint folder.", metavar="RUN_OR_CHECKPOINT")
]


def validated(section: type[Section], **values: Any) -> Section:
    """Build a section from command-line options, whose names are those of its keys."""
    try:
        return section(**values)
    except ValidationError as error:
        problems = [f"--{e['loc'][0]}: {e['msg']} (given: {e['input']})" for e in error.errors()]
        raise ConfigError("\n".join(problems).replace("_", "-")) from None


def whole_numbers(option: str, text: str) -> list[int]:
    """Return the numbers of an option such as `--k 1,2,4`.

    Raises:
        ConfigError: it is no such list.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option}: {text!r} is not a list of whole numbers, such as 1,2,4"
        ) from None


def numbers_of_samples(text: str) -> list[Samples]:
    """Return the numbers of `--samples 1,2,mean`.

    Raises:
        ConfigError: it is no such list.
    """
    try:
        return ["mean" if part == "mean" else int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--samples: {text!r} is not a list of whole numbers or mean, such as 1,2,mean"
        ) from None


def show(value: Any, as_json: bool, tell: Callable[[], Any]) -> None:
    """Print a result: as JSON and nothing else, or however `tell` does it."""
    if as_json:
        print(json.dumps(value))
    else:
        tell()
