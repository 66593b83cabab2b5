import pytest

from dmoe.config import ConfigError
from dmoe.config.node import Place
from dmoe.config.reader import MAX_DEPTH, read_yaml


def read(text):
    return read_yaml(text, "f.yaml")


def test_every_key_and_item_knows_its_line():
    tree = read("# comment\nmodel:\n  dim: 8\n  layers:\n    - a\n    - b: {c: 1}\n")
    assert tree.child("model").place == Place("f.yaml", 2)
    assert tree.child("model").child("dim").place == Place("f.yaml", 3)
    items = tree.child("model").child("layers")
    assert [item.place.line for item in items.value] == [5, 6]
    assert items.child(1).child("b").child("c").place.line == 6


def test_an_aliased_value_has_the_place_of_its_own_key():
    tree = read("a: &x {k: 1}\nb: *x\n")
    assert tree.child("b").place.line == 2
    assert tree.child("b").plain() == {"k": 1}


def test_keys_are_text():
    assert read("{1: a, on: b, null: c, é: d}").plain() == {
        "1": "a",
        "on": "b",
        "null": "c",
        "é": "d",
    }


def test_unnumbered_text_has_only_a_source():
    assert read_yaml("{a: 1}", "command line: x", numbered=False).child("a").place.line == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: duplicate key 'a'; it is already set at f.yaml:1"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "f.yaml:2: tag !!python/object/apply"),
        ("a: !!python/name:os.system x\n", "f.yaml:1: tag !!python/name:os.system is not allowed"),
        ("a:\n  !custom {b: 1}\n", "f.yaml:2: tag !custom is not allowed"),
        ("a: !!str [1]\n", "f.yaml:1: tag !!str is not allowed"),
        ("a: !!bool yes\n", "f.yaml:1: 'yes' is not a valid bool"),
        ("a: 1\nb: [1,\n", "f.yaml:3: not valid YAML: while parsing a flow node"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML: expected a single document"),
        ("a: 1\nb: *x\n", "f.yaml:2: not valid YAML: found undefined alias 'x'"),
        ("a: 1\nb: \x01\n", "f.yaml:2: not valid YAML: the character 0x0001 is not allowed"),
        ('a: "\\ud800"\n', "f.yaml:1: 'utf-16-le' codec can't decode"),
        ("? [a]\n: 1\n", "f.yaml:1: a key must be plain text"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", "f.yaml:3: merge keys '<<' are not supported"),
    ],
)
def test_bad_text_is_refused_with_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(message)


def test_billion_laughs_are_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="more than 100000 values once aliases are expanded"):
        read("\n".join(lines))


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 10_000])
def test_deep_nesting_is_refused(depth):
    with pytest.raises(ConfigError, match=f"nested deeper than {MAX_DEPTH} levels"):
        read("[" * depth + "]" * depth)


def test_nesting_within_the_bound_is_read():
    tree = read("[" * MAX_DEPTH + "]" * MAX_DEPTH).plain()
    for _ in range(MAX_DEPTH - 1):
        (tree,) = tree
    assert tree == []


def test_an_alias_of_itself_is_refused():
    with pytest.raises(ConfigError, match="an alias contains itself"):
        read("a: &a {b: *a}")
