"""Every method is written alike: the same five headings in its file, and one way to choose."""

import importlib
import inspect
import pkgutil
import re

import pytest

from dmoe.moe import capacity, expert_bias, losses, nested, peer, routers, soft
from dmoe.moe.experts import dropout, zero_computation

HEADINGS = ["Paper", "Equations", "Config", "Differs", "Shapes"]
LOSSES = [
    importlib.import_module(f"{losses.__name__}.{module.name}")
    for module in pkgutil.iter_modules(losses.__path__)
    if module.name != "groups"  # of tokens, which they share
]
METHODS = [
    *(importlib.import_module(section.__module__) for section in routers.ROUTERS),
    *LOSSES,
    *(importlib.import_module("dmoe.moe.adaptive"), capacity, expert_bias, nested, peer, soft),
    *(dropout, zero_computation),
]


@pytest.mark.parametrize("module", METHODS, ids=lambda module: module.__name__)
def test_the_file_has_the_five_headings_in_order(module) -> None:
    text = inspect.getdoc(module)
    title, blank, *rest = text.splitlines()
    assert title.endswith(".")
    assert not blank
    found = [match[1] for line in rest if (match := re.match(r"(\w+): \S", line))]
    assert found == HEADINGS
    assert all(re.match(r"\w+: |    \S", line) for line in rest), "a paragraph outside a heading"


def test_all_files_of_routers_are_among_them() -> None:
    shared = {"base", "choice", "noise", "query_norm"}
    files = {module.name for module in pkgutil.iter_modules(routers.__path__)}
    assert files - shared == {section.__module__.split(".")[-1] for section in routers.ROUTERS}


@pytest.mark.parametrize("section", routers.ROUTERS, ids=lambda section: section.__name__)
def test_a_router_chooses_in_select(section) -> None:
    """A tree of routers leaves it to these; PEER and Soft MoE are layers of another kind."""
    module = importlib.import_module(section.__module__)
    kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass)]
    kinds = [k for k in kinds if issubclass(k, routers.Router) and k.__module__ == module.__name__]
    if section in (routers.NestedConfig, routers.SoftMoEConfig, routers.PeerConfig):
        return
    [kind] = kinds
    names = list(inspect.signature(kind.select).parameters)
    assert (names[0], names[-1]) == ("self", "context")
    assert "self.select(" in inspect.getsource(kind)
