from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from dmoe.config import ConfigError, ConfigModel
from dmoe.config.merge import apply_overrides, merge, read_file
from dmoe.config.node import Node, Place
from dmoe.config.reader import read_yaml


class TopK(ConfigModel):
    name: Literal["topk"] = "topk"


class Choice(ConfigModel):
    name: Literal["expert_choice"] = "expert_choice"


class Run(ConfigModel):
    name: str = "x"


class Root(ConfigModel):
    run: Run = Run()
    router: Annotated[TopK | Choice, Field(discriminator="name")] = TopK()
    anything: Any = None


SCHEMA = (Root,)
keys = st.text("abc", min_size=1, max_size=2)
plain_leaves = st.integers() | st.none()


def mappings(leaves):
    return st.recursive(
        st.dictionaries(keys, leaves, max_size=3),
        lambda inner: st.dictionaries(keys, inner | leaves, max_size=3),
        max_leaves=8,
    )


any_mapping = mappings(plain_leaves | st.lists(st.integers(), max_size=2))


def node(plain):
    match plain:
        case dict():
            plain = {key: node(value) for key, value in plain.items()}
        case list():
            plain = [node(value) for value in plain]
    return Node(plain, Place("f.yaml", 1))


def merged(base, over):
    return merge(node(base), node(over), SCHEMA).plain()


def overridden(text, *overrides):
    return apply_overrides(read_yaml(text, "f.yaml"), overrides, SCHEMA).plain()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(name, text):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_mappings_merge_and_the_rest_is_replaced():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": {"z": 1}}
    over = {"a": {"y": [3]}, "b": None, "c": 1}
    assert merged(base, over) == {"a": {"x": 1, "y": [3]}, "b": None, "c": 1}


@given(any_mapping)
def test_merge_with_itself_or_nothing_changes_nothing(tree):
    assert merged(tree, tree) == tree
    assert merged(tree, {}) == tree
    assert merged({}, tree) == tree


@given(any_mapping, any_mapping, any_mapping)
def test_merge_is_associative_where_sections_stay_sections(a, b, c):
    # Where one file writes a value and another a mapping under the same key, the order matters;
    # so leaves and mappings get different keys here.
    a, b, c = (_leaves_apart(tree) for tree in (a, b, c))
    assert merged(merged(a, b), c) == merged(a, merged(b, c))


def _leaves_apart(tree):
    return {
        key if isinstance(value, dict) else f"leaf_{key}": _leaves_apart(value)
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


def test_places_are_those_of_the_last_writer():
    base, over = read_yaml("{a: 1, b: 2}", "base.yaml"), read_yaml("\nb: 3", "over.yaml")
    both = merge(base, over, SCHEMA)
    assert str(both.child("a").place) == "base.yaml:1"
    assert str(both.child("b").place) == "over.yaml:2"


def test_another_name_drops_the_keys_of_the_former_choice():
    base = {"router": {"name": "topk", "top_k": 2}}
    assert merged(base, {"router": {"name": "expert_choice"}}) == {
        "router": {"name": "expert_choice"}
    }
    assert merged(base, {"router": {"name": "topk", "x": 1}})["router"]["top_k"] == 2
    assert merged(base, {"router": {"x": 1}})["router"]["top_k"] == 2


def test_a_name_that_chooses_nothing_drops_nothing():
    assert merged({"run": {"name": "a", "seed": 1}}, {"run": {"name": "b"}}) == {
        "run": {"name": "b", "seed": 1}
    }


def test_extends_puts_parents_first(write):
    write("base.yaml", "a: {x: 1, y: 1, z: 1}")
    write("parts/one.yaml", "extends: ../base.yaml\na: {y: 2, z: 2}")
    write("parts/two.yaml", "b: 2")
    path = write("run.yaml", "extends: [parts/one.yaml, parts/two.yaml]\na: {z: 3}")
    tree = read_file(path, SCHEMA)
    assert tree.plain() == {"a": {"x": 1, "y": 2, "z": 3}, "b": 2}
    assert str(tree.child("a").child("x").place) == "parts/../base.yaml:1"
    assert str(tree.child("a").child("z").place) == "run.yaml:2"


def test_two_files_may_share_a_parent(write):
    write("base.yaml", "a: 1")
    write("one.yaml", "extends: base.yaml")
    path = write("run.yaml", "extends: [one.yaml, base.yaml]")
    assert read_file(path, SCHEMA).plain() == {"a": 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.yaml": "extends: b.yaml", "b.yaml": "\nextends: a.yaml"},
            "b.yaml:2: extends: these files extend each other: a.yaml -> b.yaml -> a.yaml",
        ),
        ({"a.yaml": "extends: a.yaml"}, "a.yaml:1: extends: these files extend each other"),
        ({"a.yaml": "x: 1\nextends: no.yaml"}, "a.yaml:2: extends: no such file: no.yaml"),
        ({"a.yaml": "extends: [b.yaml, 3]", "b.yaml": "x: 1"}, "a.yaml:1: extends: write a file"),
        ({"a.yaml": "extends:\n"}, "a.yaml:1: extends: write a file name or a list"),
        ({"a.yaml": "# nothing\n"}, "a.yaml: this config is empty"),
        ({"a.yaml": "[1]"}, "a.yaml: this config does not hold a mapping"),
    ],
)
def test_bad_files_are_refused(write, files, message):
    for name, text in files.items():
        write(name, text)
    with pytest.raises(ConfigError) as caught:
        read_file(Path("a.yaml"), SCHEMA)
    assert str(caught.value).startswith(message)


def test_unreadable_files_are_named_as_given(tmp_path):
    with pytest.raises(ConfigError, match=r"^no/x\.yaml: cannot read this config: No such file"):
        read_file(Path("no/x.yaml"), SCHEMA)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_file(tmp_path, SCHEMA)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text: .* at byte 3"):
        read_file(tmp_path / "latin.yaml", SCHEMA)


def test_unicode_is_kept(write):
    assert read_file(write("ü.yaml", "naïve: 数据 🙂"), SCHEMA).plain() == {"naïve": "数据 🙂"}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=null", None),
        ("a.b=", None),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b={x: 1}", {"x": 1}),
        ("a.b=3e-4", 3e-4),
        ("a.b=x=y", "x=y"),
        ("a.b='7'", "7"),
        ("a.b.c=1", {"c": 1}),
    ],
)
def test_override_values_are_yaml(override, value):
    assert overridden("{a: {b: 0, c: 1}}", override) == {"a": {"b": value, "c": 1}}


def test_overrides_merge_create_and_index():
    assert overridden("{a: {b: 1}}", "a={c: 2}") == {"a": {"b": 1, "c": 2}}
    assert overridden("{a: null}", "a.b.c=2", "d.e=1") == {"a": {"b": {"c": 2}}, "d": {"e": 1}}
    assert overridden("{a: [{x: 1, y: 1}, 2]}", "a.0.x=3", "a.1=4") == {"a": [{"x": 3, "y": 1}, 4]}
    assert overridden("{a: 1}", "a=2", "a=3") == {"a": 3}


@given(mappings(plain_leaves), st.lists(keys, min_size=1, max_size=3), st.integers())
def test_an_override_is_a_file_of_one_key(tree, path, value):
    nested = value
    for key in reversed(path):
        nested = {key: nested}
    got = apply_overrides(node(tree), [f"{'.'.join(path)}={value}"], SCHEMA)
    assert got.plain() == merged(tree, nested)


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_on_the_command_line_keeps_the_keys_given_with_it(order):
    overrides = ["router.name=expert_choice", "router.factor=2"][::order]
    got = overridden("{router: {name: topk, top_k: 2}}", *overrides)
    assert got == {"router": {"name": "expert_choice", "factor": 2}}


def test_an_outer_choice_is_made_before_an_inner_one():
    overrides = ["router.inner.name=b", "router.name=expert_choice"]
    got = overridden("{router: {name: topk, inner: {name: a}}}", *overrides)
    assert got == {"router": {"name": "expert_choice", "inner": {"name": "b"}}}


@pytest.mark.parametrize("override", ["a.b", "=1", "a..b=1", ".a=1", ""])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(ConfigError) as caught:
        overridden("{a: 1}", override)
    assert str(caught.value).startswith(
        f"command line: {override}: an override has the form KEY=VALUE"
    )


@pytest.mark.parametrize("override", ["a.2=1", "a.-1=1", "a.x=1"])
def test_indices_beyond_the_list_are_refused(override):
    with pytest.raises(ConfigError, match="not an index into the list there, which has 2 items"):
        overridden("{a: [1, 2]}", override)


def test_bad_yaml_in_an_override_is_placed_there():
    with pytest.raises(ConfigError, match=r"^command line: a=\[1: not valid YAML"):
        overridden("{a: 1}", "a=[1")
