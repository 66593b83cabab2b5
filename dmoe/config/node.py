"""A config before it is checked: plain values, each with the place where the user wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COMMAND_LINE = "command line"
"""How messages call the origin of overrides."""

Scalar = bool | int | float | str | None


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written: a file and line, or an override of the command line."""

    source: str
    """The file as the user named it, or `command line: KEY=VALUE`."""

    line: int = 0
    """Counted from 1; 0 stands for the source as a whole."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Node:
    """A value and its place; in a mapping that is the place of the key, in a list of the item."""

    value: Scalar | dict[str, Node] | list[Node]
    place: Place

    @property
    def entries(self) -> dict[str, Node]:
        """The entries of a mapping; nothing for any other value."""
        return self.value if isinstance(self.value, dict) else {}

    def child(self, step: str | int) -> Node | None:
        """Return the value under a key or a list index, or None where there is none."""
        if isinstance(self.value, list):
            index = int(step) if str(step).isdecimal() else len(self.value)
            return self.value[index] if index < len(self.value) else None
        return self.entries.get(str(step))

    def plain(self) -> Any:
        """Return the value without places, as Python's own types."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value
