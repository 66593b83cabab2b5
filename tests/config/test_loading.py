import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from dmoe.config import ConfigError, ConfigModel, load_config


class Constant(ConfigModel):
    name: Literal["constant"] = "constant"


class Cosine(ConfigModel):
    name: Literal["cosine"] = "cosine"
    final: float = 0.1


class Root(ConfigModel):
    steps: int = 1
    rate: float = 1.0
    betas: tuple[float, ...] = (0.9,)
    path: Path = Path()
    per_layer: dict[int, int] | None = None
    schedule: Annotated[Constant | Cosine, Field(discriminator="name")] = Constant()
    anything: Any = None


@pytest.fixture
def load(tmp_path):
    def _load(text, *overrides):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return load_config(path, overrides, Root)

    return _load


def test_values_reach_their_types(load):
    config = load("{steps: 1e6, rate: 3, betas: [0, 1e-1], path: a/b, per_layer: {3: 1}}")
    assert config == Root(
        steps=1_000_000, rate=3.0, betas=(0.0, 0.1), path=Path("a/b"), per_layer={3: 1}
    )
    assert type(config.rate) is float


def test_defaults_file_overrides(load):
    assert load("{rate: 2.0}").steps == 1
    assert load("{rate: 2.0}", "rate=3e-4").rate == 3e-4
    assert load("{}", "schedule.name=cosine", "schedule.final=0") == Root(
        schedule=Cosine(final=0.0)
    )


def test_a_child_file_may_switch_a_choice(load, tmp_path):
    (tmp_path / "base.yaml").write_text("schedule: {name: cosine, final: 0.5}")
    assert load("{extends: base.yaml}").schedule == Cosine(final=0.5)
    assert load("{extends: base.yaml, schedule: {name: constant}}").schedule == Constant()


def test_unicode_beyond_the_basic_plane_is_text(load):
    assert load('anything: "naïve \\ud83d\\ude42 数据"').anything == "naïve 🙂 数据"


def test_nothing_is_guessed(load):
    with pytest.raises(ConfigError) as caught:
        load("{steps: '3', rate: true, per_layer: {1: yes}}")
    assert len(str(caught.value).splitlines()) == 3


def test_a_default_that_is_no_json_is_fine(load):
    assert load("{}") == Root()


def test_a_missing_file_is_named_as_given():
    with pytest.raises(ConfigError, match=r"^no/such\.yaml: cannot read this config"):
        load_config("no/such.yaml", (), Root)


def test_the_default_schema_is_the_root_config_of_the_product(monkeypatch, tmp_path):
    module = ModuleType("dmoe.trainer.config")
    module.Config = Root
    monkeypatch.setitem(sys.modules, "dmoe.trainer", ModuleType("dmoe.trainer"))
    monkeypatch.setitem(sys.modules, "dmoe.trainer.config", module)
    (tmp_path / "x.yaml").write_text("steps: 5")
    assert load_config(tmp_path / "x.yaml") == Root(steps=5)
