"""What a schema allows at a key: its sections, and the choices among them by `name`.

Where several sections may stand under one key (`router: {name: ...}`), each has a literal `name`.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from dmoe.config.base import names_of
from dmoe.config.plugins import OpenChoice

Sections = tuple[type[BaseModel], ...]
"""The sections that may stand at one place: none for a plain value, several for a choice."""


def sections_of(annotation: Any, metadata: Sequence[Any] = ()) -> Sections:
    """Return the sections inside an annotation such as `A | B | None` or `list[A]`.

    Args:
        annotation: of a field, or a part of one.
        metadata: what pydantic has taken out of an `Annotated` around it.
    """
    for item in metadata:
        if isinstance(item, OpenChoice):
            return item.sections
    if get_origin(annotation) is Annotated:
        return sections_of(annotation.__origin__, annotation.__metadata__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    found = (section for arg in get_args(annotation) for section in sections_of(arg))
    return tuple(dict.fromkeys(found))


def sections_under(sections: Sections, key: str) -> Sections:
    """Return the sections that may stand under a key of any of the given ones."""
    fields = (section.model_fields[key] for section in sections if key in section.model_fields)
    found = (s for field in fields for s in sections_of(field.annotation, field.metadata))
    return tuple(dict.fromkeys(found))


def allowed_keys(sections: Sections) -> list[str]:
    """Return the keys of the given sections, in the order of their definition."""
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def key_paths(sections: Sections, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield all keys of a schema with their place: `("top_k", "moe.router.top_k (name: topk)")`."""
    yield from _key_paths(sections, prefix, ())


def _key_paths(sections: Sections, prefix: str, above: Sections) -> Iterator[tuple[str, str]]:
    for section in sections:
        if section in above:  # a section may contain itself
            continue
        note = f" (name: {' or '.join(names_of(section))})" if len(sections) > 1 else ""
        for key, field in section.model_fields.items():
            yield key, f"{prefix}{key}{note}"
            index = ".0" if _holds_list(field.annotation) else ""
            inner = sections_of(field.annotation, field.metadata)
            yield from _key_paths(inner, f"{prefix}{key}{index}.", (*above, section))


def _holds_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple) or any(map(_holds_list, get_args(annotation)))
