"""What the user wrote, put together: parents named by `extends`, then the file, then overrides.

Mappings merge, everything else is replaced. Where the schema offers a choice by `name` and the name
changes, the inherited keys belonged to the other choice and are dropped.
"""

from collections.abc import Sequence
from pathlib import Path

from dmoe.config.base import ConfigError
from dmoe.config.choices import Sections, sections_under
from dmoe.config.node import COMMAND_LINE, Node, Place
from dmoe.config.reader import read_yaml


def merge(base: Node | None, over: Node, sections: Sections) -> Node:
    """Return `base` overlaid with `over`; `sections` may stand at this place of the schema."""
    both_map = base is not None and isinstance(base.value, dict) and isinstance(over.value, dict)
    if base is None or not both_map or _is_other_choice(base, over, sections):
        return over
    merged = dict(base.entries)
    for key, node in over.entries.items():
        merged[key] = merge(merged.get(key), node, sections_under(sections, key))
    return Node(merged, over.place)


def _is_other_choice(base: Node, over: Node, sections: Sections) -> bool:
    old, new = base.child("name"), over.child("name")
    return len(sections) > 1 and old is not None and new is not None and old.value != new.value


def read_file(path: Path, schema: Sections, chain: Sequence[Path] = ()) -> Node:
    """Read a config file on top of the files that it extends.

    Args:
        path: The file, as messages shall call it.
        schema: The root section.
        chain: The files that led here, each extending the next.

    Raises:
        ConfigError: A file cannot be read, is not a mapping, or extends itself.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this config: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    own = read_yaml(text, str(path))
    if not isinstance(own.value, dict):
        what = "is empty" if own.value is None else "does not hold a mapping"
        raise ConfigError(f"{path}: this config {what}; write sections such as 'train:'")

    chain = (*chain, path)
    merged: Node | None = None
    for name in _parents(own):
        parent = path.parent / str(name.value)
        _check_parent(parent, name.place, chain)
        merged = merge(merged, read_file(parent, schema, chain), schema)
    entries = {key: node for key, node in own.entries.items() if key != "extends"}
    return merge(merged, Node(entries, own.place), schema)


def _parents(own: Node) -> list[Node]:
    extends = own.child("extends")
    if extends is None:
        return []
    names = extends.value if isinstance(extends.value, list) else [extends]
    for name in names:
        if not isinstance(name.value, str):
            raise ConfigError(
                f"{name.place}: extends: write a file name or a list of file names "
                f"(given: {name.plain()!r})"
            )
    return names


def _check_parent(parent: Path, place: Place, chain: Sequence[Path]) -> None:
    if not parent.is_file():
        raise ConfigError(f"{place}: extends: no such file: {parent}")
    if parent.resolve() in [path.resolve() for path in chain]:
        cycle = " -> ".join(map(str, (*chain, parent)))
        raise ConfigError(f"{place}: extends: these files extend each other: {cycle}")


def apply_overrides(tree: Node, overrides: Sequence[str], schema: Sections) -> Node:
    """Return the tree with `a.b=c` overrides merged in from left to right.

    A `....name=` comes before the others, whatever its position: it drops the keys of the former
    choice, and must not drop those that the same command line sets for the new one.

    Raises:
        ConfigError: An override is malformed or indexes beyond a list.
    """
    parsed = [_parse_override(text) for text in overrides]
    for keys, value in sorted(parsed, key=lambda override: _rank(override[0])):
        tree = merge(tree, _overlay(tree, keys, value, schema), schema)
    return tree


def _rank(keys: list[str]) -> tuple[bool, int]:
    """Order names before all else, and an outer choice before one inside it."""
    is_name = keys[-1] == "name"
    return (not is_name, len(keys) if is_name else 0)


def _parse_override(text: str) -> tuple[list[str], Node]:
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    source = f"{COMMAND_LINE}: {text}"
    if not equals or not all(keys):
        raise ConfigError(f"{source}: an override has the form KEY=VALUE, as in train.steps=100")
    return keys, read_yaml(value, source, numbered=False)


def _overlay(tree: Node | None, keys: list[str], value: Node, sections: Sections) -> Node:
    """Nest a value under its keys; a list on the way is repeated with the one item changed."""
    if not keys:
        return value
    key, *rest = keys
    if tree is None or not isinstance(tree.value, list):
        child = tree.child(key) if tree else None
        inner = _overlay(child, rest, value, sections_under(sections, key))
        # A section that was there keeps its place: what it still lacks, the file lacks.
        return Node({key: inner}, tree.place if tree else value.place)
    item = tree.child(key)
    if item is None:
        raise ConfigError(
            f"{value.place}: {key!r} is not an index into the list there, which has "
            f"{len(tree.value)} items counted from 0; to change its length, set the whole list"
        )
    items = list(tree.value)
    items[int(key)] = merge(item, _overlay(item, rest, value, sections), sections)
    return Node(items, tree.place)
