"""Print docs/config.md: every key of a configuration, read from the config models themselves.

    python tools/config_reference.py > docs/config.md

A test compares the file with what this prints.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from dmoe.trainer.config import Config

Schema = dict[str, Any]
Homes = dict[tuple[str, ...], str]

INTRODUCTION = """\
# Configuration reference

<!-- Printed by tools/config_reference.py from the config models: do not edit. -->

Keys are written as on the command line: `model.dim=128` there is `model: {dim: 128}` in a file.
A plain key without a default must be given; a section without one has the defaults of its keys.
Where several sections may stand at a key, `name` says which. In a list, `0` is the first item.
Beside these sections a file may have the key `extends`: a file, or a list of files, to build on.

| section | what it is |
| --- | --- |"""

TYPES = {
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "string": "text",
    "object": "mapping",
    "null": "`null`",
}
BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
}


def reference() -> str:
    """Return the whole document."""
    root = Config.model_json_schema()
    defs = root["$defs"]
    sections = [
        section
        for key, field in root["properties"].items()
        for section in _sections(key, field, defs, {})
    ]
    overview = [f"| {_link(title)} | {_prose(section)} |" for _, title, section, _ in sections]
    details = [
        f"## {title}\n\n{_prose(section)}\n\n{_table(key, section, defs, homes)}"
        for key, title, section, homes in sections
    ]
    return "\n\n".join(["\n".join([INTRODUCTION, *overview]), *details]) + "\n"


def _sections(
    key: str, field: Schema, defs: Schema, homes: Homes
) -> Iterator[tuple[str, str, Schema, Homes]]:
    """Yield key, title and schema of the sections under a key, each before those inside it.

    What stands inside one of its own sections is told once; `homes` says where.
    """
    choice = tuple(_names(field))
    if choice in homes:
        return
    homes = {**homes, choice: key} if choice else homes
    for place, title, section in _places(key, field, defs):
        yield place, title, section, homes
        for name, inner in section["properties"].items():
            yield from _sections(f"{place}.{name}", inner, defs, homes)


def _places(key: str, field: Schema, defs: Schema) -> list[tuple[str, str, Schema]]:
    """Return key, title and schema of each section that may stand at a key, or in its list."""
    if "items" in field:
        return _places(f"{key}.0", field["items"], defs)
    sections = [defs[name] for name in _names(field)]
    if len(sections) == 1:
        return [(key, key, sections[0])]
    names = [section["properties"]["name"]["const"] for section in sections]
    return [(key, f"{key} ({name})", s) for name, s in zip(names, sections, strict=True)]


def _names(field: Schema) -> list[str]:
    """Return the names, in the schema, of the sections that may stand at a key."""
    return [m["$ref"].rpartition("/")[2] for m in _members(field) if "$ref" in m]


def _members(field: Schema) -> list[Schema]:
    members: list[Schema] = field.get("anyOf") or field.get("oneOf") or [field]
    return members


def _table(key: str, section: Schema, defs: Schema, homes: Homes) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section["properties"].items():
        kind = _type(homes.get(tuple(_names(field)), f"{key}.{name}"), field, defs)
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        rows.append(f"| `{name}` | {kind} | {default} | {_prose(field)} |")
    return "\n".join(rows)


def _type(key: str, field: Schema, defs: Schema) -> str:
    """Say what a value may be."""
    if "items" in field:
        return f"list of {_type(f'{key}.0', field['items'], defs)}"
    if "prefixItems" in field:
        return f"[{', '.join(_type(key, item, defs) for item in field['prefixItems'])}]"
    links = [_link(title) for _, title, _ in _places(key, field, defs)]
    plain = [
        _type(key, member, defs) if "items" in member else _plain_type(member)
        for member in _members(field)
        if "$ref" not in member
    ]
    return " or ".join(links + plain)


def _plain_type(field: Schema) -> str:
    values = field.get("enum", [field["const"]] if "const" in field else [])
    if values:
        return " or ".join(f"`{value}`" for value in values)
    kind = "path" if field.get("format") == "path" else TYPES[field["type"]]
    limits = [text.format(field[bound]) for bound, text in BOUNDS.items() if bound in field]
    return f"{kind} {', '.join(limits)}".strip()


def _prose(documented: Schema) -> str:
    text = " ".join(documented.get("description", "").split())
    assert "|" not in text, f"would end the cell of a table: {text}"
    return text


def _link(title: str) -> str:
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


if __name__ == "__main__":
    print(reference(), end="")
