import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from dmoe.config import (
    ConfigModel,
    config_schema,
    config_tree,
    diff_trees,
    flatten_tree,
    load_config,
    save_config,
)


class Constant(ConfigModel):
    name: Literal["constant"] = "constant"


class Cosine(ConfigModel):
    name: Literal["cosine"] = "cosine"
    final: float = 0.1
    """Last rate as a fraction of the first."""


class Source(ConfigModel):
    path: Path
    weight: float = 1.0


class Root(ConfigModel):
    text: str = ""
    rate: float | None = None
    steps: int = 1
    betas: tuple[float, ...] = ()
    sources: tuple[Source, ...] = ()
    per_layer: dict[int, bool] | None = None
    schedule: Annotated[Constant | Cosine, Field(discriminator="name")] = Constant()


texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["yes", "1e6", "~", "3"]
)
floats = st.floats(allow_nan=False, allow_infinity=False)
configs = st.builds(
    Root,
    text=texts,
    rate=st.none() | floats,
    steps=st.integers(-(10**18), 10**18),
    betas=st.lists(floats, max_size=3),
    sources=st.lists(st.builds(Source, path=st.just(Path("a b/ü")), weight=floats), max_size=2),
    per_layer=st.dictionaries(st.integers(), st.booleans(), max_size=2),
    schedule=st.builds(Constant) | st.builds(Cosine, final=floats),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@given(configs)
def test_a_saved_config_loads_as_an_equal_one(folder, config):
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml", (), Root) == config


def test_tree_is_plain_json():
    tree = config_tree(Root(sources=[Source(path=Path("a"))], betas=(0.5,)))
    assert json.loads(json.dumps(tree)) == tree
    assert tree["sources"] == [{"path": "a", "weight": 1.0}]
    assert tree["schedule"] == {"name": "constant"}


def test_schema_is_for_partial_files():
    schema = config_schema(Root)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert list(schema["properties"])[:2] == ["extends", "text"]
    cosine = schema["$defs"]["Cosine"]
    assert cosine["additionalProperties"] is False
    assert cosine["properties"]["final"]["description"] == "Last rate as a fraction of the first."
    assert "required" not in json.dumps(schema)
    assert "anyOf" in schema["properties"]["schedule"]


def test_flatten_goes_into_lists_of_sections_only():
    tree = {"a": {"b": 1, "c": {}}, "d": [1, 2], "e": [{"f": 1}]}
    assert flatten_tree(tree) == {"a.b": 1, "a.c": {}, "d": [1, 2], "e.0.f": 1}


def test_diff_names_what_changed():
    old = {"a": {"b": 1, "same": 0}, "d": [1, 2], "moe": None, "e": [{"f": 1}]}
    new = {"a": {"b": 2, "same": 0}, "d": [1], "moe": {"k": 2}, "e": [{"f": 1}, {"f": 3}]}
    assert diff_trees(old, new) == [
        ("a.b", 1, 2),
        ("d", [1, 2], [1]),
        ("moe.k", None, 2),
        ("e.1.f", None, 3),
    ]
    assert diff_trees(old, old) == []
