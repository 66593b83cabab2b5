"""The base of every config section, and the one error that means "the user's input is wrong"."""

from typing import Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """Bad input found before work starts; commands print it without a traceback and exit 2.

    Args:
        message: What was given, what is allowed, and what to change.
        key: The dotted key to blame, for a check inside a config section: relative to that section,
            so `parallel.ep` in the root. `load_config` turns it into the file and line of that key.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class ConfigModel(BaseModel):
    """A frozen config section: unknown keys are errors and every number is finite."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        # On first use, when plug-ins can be looked for (`dmoe.config.plugins`).
        defer_build=True,
    )


def names_of(section: type[BaseModel]) -> tuple[str, ...]:
    """Return the names by which a section is chosen; nothing where it is no choice."""
    field = section.model_fields.get("name")
    is_choice = field is not None and get_origin(field.annotation) is Literal
    return get_args(field.annotation) if field and is_choice else ()
