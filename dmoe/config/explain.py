"""Turns pydantic's validation errors into lines that name the file, the line, the key and a remedy.

Called by `load_config` alone; one line a problem, in the order of the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import ErrorDetails

from dmoe.config.base import ConfigError, names_of
from dmoe.config.choices import Sections, allowed_keys, key_paths, sections_under
from dmoe.config.node import COMMAND_LINE, Node, Place

_WORDING = {
    "bool_type": "write true or false",
    "dict_type": "input should be a mapping of keys",
    "finite_number": "input should be a finite number",
    "list_type": "input should be a list",
    "model_type": "input should be a mapping of keys",
    "tuple_type": "input should be a list",
}
_MAX_PLACES = 3


@dataclass(frozen=True)
class Spot:
    """What an error points at."""

    path: tuple[str, ...]
    """The keys as the user wrote them."""

    node: Node | None
    """The value at the path, where the user wrote one."""

    place: Place
    """The place of that value, or of the nearest section around it."""

    owner: Sections
    """The sections that the last key of the path may belong to."""

    inside: Sections
    """The sections that may stand at the path."""

    def step(self, key: str | int) -> Spot:
        """Go to a key or a list index."""
        node = self.node.child(key) if self.node else None
        is_field = key in allowed_keys(self.inside)
        return Spot(
            path=(*self.path, str(key)),
            node=node,
            place=node.place if node else self.place,
            owner=self.inside,
            inside=sections_under(self.inside, str(key)) if is_field else self.inside,
        )


@dataclass(frozen=True)
class _Problem:
    """One finding of pydantic in our words."""

    spot: Spot
    message: str

    facts: str = ""
    """What was given or is allowed, in parentheses at the end of the line."""


def explain(errors: Iterable[ErrorDetails], tree: Node, schema: Sections) -> str:
    """Return the problems of a config as text.

    Args:
        errors: What pydantic found in `tree`.
        tree: The merged config.
        schema: The root section.
    """
    found: dict[tuple[Place, str], list[_Problem]] = {}
    for detail in errors:
        problem = _problem(detail, tree, schema)
        key = ".".join(problem.spot.path)
        found.setdefault((problem.spot.place, key), []).append(problem)
    return "\n".join(_line(*where, problems) for where, problems in sorted(found.items()))


def _line(place: Place, key: str, problems: list[_Problem]) -> str:
    # A value that fits no member of `int | list[int]` is one problem with two messages.
    messages = [problem.message for problem in problems]
    others = (f" or {message.removeprefix('input should be ')}" for message in messages[1:])
    text = "".join([messages[0], *others]) + problems[-1].facts
    named = not key or place.source.startswith(f"{COMMAND_LINE}: {key}=")
    return f"{place}: {text}" if named else f"{place}: {key}: {text}"


def _problem(detail: ErrorDetails, tree: Node, schema: Sections) -> _Problem:
    spot = locate(detail["loc"], tree, schema)
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(spot, schema)
        case "missing":
            return _Problem(spot, "required, but not given")
        case "union_tag_invalid" | "union_tag_not_found":
            return _bad_name(spot.step("name"))
        case "value_error":
            cause = detail["ctx"]["error"]
            for key in cause.key.split(".") if isinstance(cause, ConfigError) and cause.key else ():
                spot = spot.step(key)
            return _Problem(spot, str(cause))
        case kind:
            message = _WORDING.get(kind) or detail["msg"][:1].lower() + detail["msg"][1:]
            hint = "; quote it to make it text" if kind == "string_type" else ""
            return _Problem(spot, message, f" (given: {_shown(detail['input'])}{hint})")


def locate(loc: tuple[str | int, ...], tree: Node, schema: Sections) -> Spot:
    """Follow pydantic's location, which also names the union members that were tried."""
    spot = Spot(path=(), node=tree, place=tree.place, owner=(), inside=schema)
    for step in loc:
        in_list = isinstance(step, int) and spot.node and isinstance(spot.node.value, list)
        chosen = tuple(s for s in spot.inside if step in (s.__name__, *names_of(s)))
        if len(spot.inside) > 1 and chosen:
            spot = replace(spot, inside=chosen)
        elif in_list or (spot.node and spot.node.child(step)) or step in allowed_keys(spot.inside):
            spot = spot.step(step)
    return spot


def _unknown_key(spot: Spot, schema: Sections) -> _Problem:
    key, allowed = spot.path[-1], allowed_keys(spot.owner)
    message = "unknown key"
    elsewhere = [path for name, path in key_paths(schema) if name == key][:_MAX_PLACES]
    if "." in key:
        message += "; dots join keys on the command line only, in a file keys are nested"
    if elsewhere:
        message += f"; a key of this name exists at {', '.join(elsewhere)}"
    return _Problem(spot, message + _did_you_mean(key, allowed), _allowed(allowed))


def _bad_name(spot: Spot) -> _Problem:
    names = [str(name) for section in spot.owner for name in names_of(section)]
    if spot.node is None:
        return _Problem(spot, "required, but not given", _allowed(names))
    given = spot.node.plain()
    message = f"unknown name {given!r}{_did_you_mean(str(given), names)}"
    return _Problem(spot, message, _allowed(names))


def _allowed(names: list[str]) -> str:
    return f" (allowed: {', '.join(names)})"


def _did_you_mean(given: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(given, allowed, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(given: Any) -> str:
    match given:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return repr(given)
        case _:
            return json.dumps(given)
