"""Reads YAML text into nodes that know their lines; used for files and for override values.

Input is not trusted: plain values only, no duplicate keys, bounded aliases and depth.
"""

import yaml

from dmoe.config.base import ConfigError
from dmoe.config.dialect import Loader, scalar_value
from dmoe.config.node import Node, Place

MAX_NODES = 100_000
"""Values of one config after its aliases are expanded; a "billion laughs" file has many more."""

MAX_DEPTH = 64
"""Levels of nesting; an alias that contains itself has infinitely many."""


def read_yaml(text: str, source: str, *, numbered: bool = True) -> Node:
    """Parse YAML text.

    Args:
        text: The whole text; no text is null.
        source: How messages call its origin.
        numbered: Whether places carry line numbers.

    Raises:
        ConfigError: The text is not YAML of our dialect, or is beyond the bounds above.
    """
    reader = _Reader(source, numbered)
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{reader.place(mark)}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if numbered else 0
        what = f"the character {error.character:#06x} is not allowed"
        raise ConfigError(f"{Place(source, line)}: not valid YAML: {what}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested deeper than {MAX_DEPTH} levels") from None
    return Node(None, Place(source)) if root is None else reader.node(root, Place(source), 1)


class _Reader:
    """Turns PyYAML's nodes into ours, counting what it makes."""

    def __init__(self, source: str, numbered: bool) -> None:
        self._source = source
        self._numbered = numbered
        self._num_nodes = 0

    def place(self, mark: yaml.Mark | None) -> Place:
        return Place(self._source, mark.line + 1 if mark and self._numbered else 0)

    def node(self, raw: yaml.Node, place: Place, depth: int) -> Node:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise ConfigError(f"{place}: more than {MAX_NODES} values once aliases are expanded")
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"{place}: nested deeper than {MAX_DEPTH} levels, or an alias contains itself"
            )
        if isinstance(raw, yaml.MappingNode) and raw.tag == "tag:yaml.org,2002:map":
            return Node(self._entries(raw, depth), place)
        if isinstance(raw, yaml.SequenceNode) and raw.tag == "tag:yaml.org,2002:seq":
            items = [self.node(item, self.place(item.start_mark), depth + 1) for item in raw.value]
            return Node(items, place)
        try:
            return Node(scalar_value(raw), place)
        except ValueError as error:
            raise ConfigError(f"{self.place(raw.start_mark)}: {error}") from None

    def _entries(self, raw: yaml.MappingNode, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for raw_key, raw_value in raw.value:
            place = self.place(raw_key.start_mark)
            if not isinstance(raw_key, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key must be plain text")
            key = raw_key.value
            if key in entries:
                raise ConfigError(
                    f"{place}: duplicate key {key!r}; it is already set at {entries[key].place}"
                )
            if key == "<<":
                raise ConfigError(
                    f"{place}: merge keys '<<' are not supported; "
                    "put shared settings into a file and name it under 'extends'"
                )
            entries[key] = self.node(raw_value, place, depth + 1)
        return entries
