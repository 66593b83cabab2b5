"""The architecture, enforced: a package imports from the floors below its own, and nothing else.

Packages of one floor do not know each other. `dmoe.config` finds the root config, on floor 6, by
name at run time (importlib), which is no import statement.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    8: ["cli"],
    7: ["train"],
    6: ["trainer"],
    5: ["evaluation", "generation"],
    4: ["engine", "checkpoint"],
    3: ["models", "optim"],
    2: ["moe", "metrics"],
    1: ["ops", "parallel", "data", "planner"],
    0: ["config", "rng", "testing"],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
FILES = sorted((ROOT / "dmoe").rglob("*.py"))
MAX_LINES = 450


def part_of(module: str) -> str:
    """Return the package or top module that a module belongs to: moe for dmoe.moe.layer."""
    return module.split(".")[1]


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the dmoe modules that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative imports hide the floor"
            # `from dmoe import rng` imports a module, too.
            names = [f"dmoe.{alias.name}" for alias in node.names]
            names = names if node.module == "dmoe" else [node.module or ""]
        else:
            continue
        yield from (name for name in names if name.startswith("dmoe."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES, "a file this long has two subjects"
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if module == "dmoe.__init__":
        return
    here = part_of(module)
    for name in imports(ast.parse(text)):
        there = part_of(name)
        assert there == here or FLOOR_OF[there] < FLOOR_OF[here], (
            f"{module} (floor {FLOOR_OF[here]}) imports {name} (floor {FLOOR_OF[there]})"
        )


def test_every_part_has_a_floor() -> None:
    parts = {part_of(".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in FILES}
    assert parts - {"__init__"} <= set(FLOOR_OF)
