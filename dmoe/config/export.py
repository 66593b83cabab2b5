"""A checked config as plain data: saved beside checkpoints, compared on resume, for editors."""

from pathlib import Path
from typing import Any

import yaml

from dmoe.config.base import ConfigModel
from dmoe.config.dialect import Dumper
from dmoe.config.files import write_atomically
from dmoe.config.loading import root_schema

Tree = dict[str, Any]


def config_tree(config: ConfigModel) -> Tree:
    """Return the resolved config, defaults included, as what JSON can hold."""
    return config.model_dump(mode="json")


def dump_yaml(tree: Tree) -> str:
    """Return a config tree as YAML that `load_config` reads back equal."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def save_config(config: ConfigModel, path: str | Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal object."""
    write_atomically(Path(path), dump_yaml(config_tree(config)))


def config_schema(schema: type[ConfigModel] | None = None) -> Tree:
    """Return the JSON schema of config files, for editors.

    Nothing is required and a choice may lack its `name`, because a file that extends another one
    holds only what differs.

    Args:
        schema: The root section; None is the product's own.
    """
    tree = _partial((schema or root_schema()).model_json_schema())
    name = {"type": "string"}
    extends = {
        "description": "Files that this one builds on, relative to it; later ones win.",
        "anyOf": [name, {"type": "array", "items": name}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **tree,
        "properties": {"extends": extends, **tree["properties"]},
    }


def _partial(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_partial(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    # Under "properties" these words are a user's keys, and their values are not lists.
    return {
        "anyOf" if key == "oneOf" and isinstance(value, list) else key: _partial(value)
        for key, value in tree.items()
        if not (key == "required" and isinstance(value, list))
    }


def flatten_tree(tree: Any, prefix: str = "") -> Tree:
    """Return dotted keys and their leaves; a list of plain values is a leaf."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
        items = list(enumerate(tree))
    else:
        items = []
    if not items:
        return {prefix: tree}
    flat: Tree = {}
    for key, value in items:
        flat |= flatten_tree(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def diff_trees(old: Tree, new: Tree) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old, new) where two trees differ; None where one lacks the key."""
    flat_old, flat_new = flatten_tree(old), flatten_tree(new)
    keys = dict.fromkeys([*flat_old, *flat_new])
    pairs = ((key, flat_old.get(key), flat_new.get(key)) for key in keys)
    return [(key, before, after) for key, before, after in pairs if before != after]
