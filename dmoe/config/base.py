"""The base of every config section, and the one error that means "the user's input is wrong"."""

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
    )
