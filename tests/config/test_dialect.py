import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.dialect import Dumper
from dmoe.config.reader import read_yaml

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        ["yes", "no", "on", "1e6", "0o17", "1_000", "1:30", "null", "~", "<<", "=", ""]
    )
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab.: é"), inner),
    max_leaves=12,
)


def read(text):
    return read_yaml(text, "f.yaml").plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        ("1E+2", 100.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("!!str 3", "3"),
        ("!!float 3", 3.0),
    ],
)
def test_scalars_of_yaml_1_2(text, value):
    got = read(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "text", ["yes", "no", "on", "off", "y", "1_000", "1:30", "2024-01-01", "0b11", "1e", "=", "'3'"]
)
def test_words_stay_words(text):
    assert read(text) == text.strip("'")


def test_nan_is_read_as_a_number():
    assert math.isnan(read(".nan"))


@given(trees)
def test_what_is_written_is_read_back(tree):
    text = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    assert read(text) == tree


@given(trees)
def test_what_is_written_means_the_same_to_other_yaml_readers(tree):
    assert yaml.safe_load(yaml.dump(tree, Dumper=Dumper, allow_unicode=True)) == tree


def test_equal_values_are_written_out_in_full():
    shared = [1, 2]
    assert "&" not in yaml.dump({"a": shared, "b": shared}, Dumper=Dumper)
