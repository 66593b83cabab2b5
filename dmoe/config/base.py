"""The base of every config section, and the one error that means "the user's input is wrong"."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """Bad input found before work starts; commands print it without a traceback and exit 2."""


class ConfigModel(BaseModel):
    """A frozen config section: unknown keys are errors, and no value is changed after loading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
