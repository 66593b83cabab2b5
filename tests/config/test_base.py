import copy

import pytest
from pydantic import ValidationError

from dmoe.config import ConfigError, ConfigModel


class Section(ConfigModel):
    rate: float = 1.0
    """A rate."""


def test_section_is_frozen_and_closed_and_finite():
    with pytest.raises(ValidationError, match="frozen"):
        Section().rate = 2.0
    with pytest.raises(ValidationError, match="Extra inputs"):
        Section(rat=1.0)
    with pytest.raises(ValidationError, match="finite"):
        Section(rate=float("nan"))


def test_field_docstrings_become_descriptions():
    assert Section.model_fields["rate"].description == "A rate."


def test_error_keeps_its_key_when_copied():
    error = copy.copy(ConfigError("ep is 3", key="parallel.ep"))
    assert (str(error), error.key) == ("ep is 3", "parallel.ep")
