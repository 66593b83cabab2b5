from dmoe.config.node import Node, Place
from dmoe.config.reader import read_yaml


def test_place_reads_like_a_compiler_message():
    assert str(Place("configs/x.yaml", 12)) == "configs/x.yaml:12"
    assert str(Place("command line: a=1")) == "command line: a=1"


def test_child_takes_keys_and_indices():
    tree = read_yaml("a: [x, {b: 1}]", "f.yaml")
    items = tree.child("a")
    assert items.child(1).child("b").value == 1
    assert items.child("0").value == "x"
    assert items.child(2) is None
    assert items.child("-1") is None
    assert items.child("b") is None
    assert Node(3, Place("f.yaml")).child("a") is None


def test_plain_drops_places():
    assert read_yaml("{a: [1, {b: null}]}", "f.yaml").plain() == {"a": [1, {"b": None}]}
