"""The way from YAML files and command line overrides to one checked, frozen config.

Called by every entry point before any worker starts. Precedence: parents named by `extends`, then
the file, then overrides.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.config.explain import explain, locate
from dmoe.config.merge import apply_overrides, read_file
from dmoe.config.node import Node

Schema = TypeVar("Schema", bound=ConfigModel)

# Beyond this a float no longer holds every integer.
_MAX_EXACT = 2**53


# The product's root config has fields that floor 0 cannot name, hence Any.
@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any: ...
@overload
def load_config(
    path: str | Path, overrides: Sequence[str] = (), schema: type[Schema] = ...
) -> Schema: ...
def load_config(
    path: str | Path, overrides: Sequence[str] = (), schema: type[ConfigModel] | None = None
) -> ConfigModel:
    """Load and check a config.

    Args:
        path: A YAML file; it may name parents under `extends`, relative to itself.
        overrides: Texts of the form `a.b=c`; the value is YAML, a number in `a.b` indexes a list.
        schema: The root section; None is the product's own.

    Raises:
        ConfigError: Everything that is wrong, a line each, with file and line or the override.
    """
    schema = schema or root_schema()
    tree = apply_overrides(read_file(Path(path), (schema,)), overrides, (schema,))
    config, errors = _validate(tree, schema)
    if config is None or errors:
        raise ConfigError(explain(errors, tree, (schema,)))
    return config


def root_schema() -> type[ConfigModel]:
    """Return the product's root config.

    It is composed of sections from every floor and so lives above them all: this is the one import
    that goes upwards, made when called, so that `dmoe.config` is the public door.
    """
    schema: type[ConfigModel] = importlib.import_module("dmoe.trainer.config").Config
    return schema


def _validate(
    tree: Node, schema: type[ConfigModel]
) -> tuple[ConfigModel | None, list[ErrorDetails]]:
    """Validate twice: pydantic's usual mode makes the config, its strict one finds more mistakes.

    The usual mode guesses: it takes the text '3' for a number, yes and 1 for true. The strict mode
    does not, and reads JSON, where it still takes a list for a tuple and text for a path; but it
    also refuses defaults that are no JSON, so only its errors about what the user wrote count.
    """
    plain = tree.plain()
    config = None
    errors: dict[tuple[int | str, ...], ErrorDetails] = {}
    try:
        config = schema.model_validate(plain)
    except ValidationError as error:
        errors |= {detail["loc"]: detail for detail in error.errors(include_url=False)}
    try:
        schema.model_validate_json(json.dumps(_numbers(plain)), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if locate(detail["loc"], tree, (schema,)).node is not None:
                errors[detail["loc"]] = detail
    return config, list(errors.values())


def _numbers(tree: Any) -> Any:
    """Write whole floats as ints, which float fields take too: `steps: 1e6` is a million steps."""
    match tree:
        case dict():
            return {key: _numbers(value) for key, value in tree.items()}
        case list():
            return [_numbers(value) for value in tree]
        case float() if tree.is_integer() and abs(tree) <= _MAX_EXACT:
            return int(tree)
        case _:
            return tree
