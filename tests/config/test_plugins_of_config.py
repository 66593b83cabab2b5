"""Choices that installed packages add sections to, found by real metadata on the path."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest

from dmoe.config import ConfigError, ConfigModel, config_schema, load_config
from dmoe.config.choices import sections_of
from dmoe.config.plugins import OpenChoice


class Shape(ConfigModel):
    name: str


class Square(Shape):
    name: Literal["square"] = "square"
    side: float = 1.0


class Hole(Shape):
    name: Literal["hole"]
    around: "AnyShape"


BUILTIN = (Square, Hole)
CIRCLE = """
from typing import Literal
import test_plugins_of_config

class Circle(test_plugins_of_config.Shape):
    name: Literal["circle"]
    radius: float = 1.0
"""
AnyShape = Annotated[Shape, OpenChoice("dmoe.tests.shapes", Shape, f"{__name__}:BUILTIN")]


def install(folder: Path, points: str, code: str = CIRCLE) -> None:
    """Leave a package in a folder as an installer does."""
    (folder / "shapes_plugin.py").write_text(code)
    metadata = folder / "shapes_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shapes-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[dmoe.tests.shapes]\n{points}\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("shapes_plugin", None)


def choice() -> OpenChoice:
    """Return a choice that has not looked for plug-ins yet."""
    return OpenChoice("dmoe.tests.shapes", Shape, f"{__name__}:BUILTIN")


def test_sections_of_a_plugin_join_those_of_the_package(folder: Path) -> None:
    install(folder, "circle = shapes_plugin:Circle")
    open_choice = choice()

    class Root(ConfigModel):
        shape: Annotated[Shape, open_choice] = Square()
        others: tuple[Annotated[Shape, open_choice], ...] = ()

    sections = sections_of(Annotated[Shape, open_choice] | None)
    assert [section.__name__ for section in sections] == ["Square", "Hole", "Circle"]
    path = folder / "root.yaml"
    path.write_text(
        "shape: {name: circle, radius: 2}\nothers: [{name: hole, around: {name: square}}]"
    )
    root = load_config(path, schema=Root)
    assert root.shape.radius == 2
    assert root.others[0].around == Square()
    assert set(config_schema(Root)["$defs"]) == {"Square", "Hole", "Circle"}
    path.write_text("shape: {name: circle, side: 2}")
    with pytest.raises(
        ConfigError, match=r"root.yaml:1: shape.side: unknown key; a key of this na"
    ):
        load_config(path, schema=Root)


@pytest.mark.parametrize(
    ("points", "code", "reason"),
    [
        ("circle = shapes_plugin:Circle", "import no_such_module", "ModuleNotFoundError: No mod"),
        ("circle = shapes_plugin:Nothing", CIRCLE, "AttributeError"),
        ("circle = shapes_plugin:Literal", CIRCLE, "shapes_plugin:Literal is no Shape"),
        ("round = shapes_plugin:Circle", CIRCLE, 'must have the field name: Literal."round".'),
        ("square = shapes_plugin:Circle", CIRCLE, "dmoe has that name already"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(
    folder: Path, points: str, code: str, reason: str
) -> None:
    install(folder, points, code)
    with pytest.raises(ConfigError, match=reason) as caught:
        _ = choice().sections
    assert "of shapes-plugin" in str(caught.value)
    assert "uninstall it" in str(caught.value)


def test_the_error_reaches_the_one_who_loads_a_config(folder: Path) -> None:
    install(folder, "circle = shapes_plugin:Nothing")

    class Root(ConfigModel):
        shape: Annotated[Shape, choice()] = Square()

    (folder / "root.yaml").write_text("shape: {name: square}")
    with pytest.raises(ConfigError, match="plug-in 'circle' of shapes-plugin"):
        load_config(folder / "root.yaml", schema=Root)
