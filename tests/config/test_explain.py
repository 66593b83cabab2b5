"""Each message that a mistake in a config can cause, as the user sees it."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator, model_validator

from dmoe.config import ConfigError, ConfigModel, load_config


class TopK(ConfigModel):
    name: Literal["topk"] = "topk"
    top_k: int = Field(2, gt=0)
    # Named like the other choice, to be told apart from it in pydantic's locations.
    expert_choice: int = 0


class ExpertChoice(ConfigModel):
    name: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = 1.0


class Moe(ConfigModel):
    router: Annotated[TopK | ExpertChoice, Field(discriminator="name")] = TopK()
    k: int | list[int] = 1
    num_experts: int = 8

    @model_validator(mode="after")
    def _check(self):
        if isinstance(self.router, TopK) and self.router.top_k > self.num_experts:
            raise ConfigError(
                f"top_k {self.router.top_k} > {self.num_experts} experts", key="router.top_k"
            )
        return self


class Model(ConfigModel):
    dim: int = 8
    family: Literal["gpt2", "llama"] = "llama"
    moe: Moe | None = None


class Source(ConfigModel):
    path: Path
    weight: float = Field(1.0, ge=0)


class Train(ConfigModel):
    steps: int = Field(10, gt=0)
    compile: bool = False
    betas: tuple[float, float] = (0.9, 0.95)

    @field_validator("betas")
    @classmethod
    def _rising(cls, betas):
        if betas[0] > betas[1]:
            raise ValueError(f"betas {betas} must not fall")
        return betas


class Run(ConfigModel):
    name: str


class Root(ConfigModel):
    run: Run | None = None
    model: Model = Model()
    train: Train = Train()
    sources: tuple[Source, ...] = ()
    named: dict[str, Source] | None = None

    @model_validator(mode="after")
    def _check(self):
        if self.model.dim % 2:
            raise ConfigError(f"dim {self.model.dim} is odd", key="model.dim")
        if self.train.steps == 13:
            raise ValueError("thirteen steps")
        return self


@pytest.fixture
def complain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _complain(text, *overrides):
        Path("x.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config("x.yaml", overrides, Root)
        return str(caught.value)

    return _complain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model:\n  moe:\n    router: {name: topk, topk: 3}",
            "x.yaml:3: model.moe.router.topk: unknown key; did you mean 'top_k'? "
            "(allowed: name, top_k, expert_choice)",
        ),
        (
            "steps: 3",
            "x.yaml:1: steps: unknown key; a key of this name exists at train.steps "
            "(allowed: run, model, train, sources, named)",
        ),
        (
            "model:\n  moe: {router: {name: topk, capacity_factor: 3}}",
            "x.yaml:2: model.moe.router.capacity_factor: unknown key; a key of this name exists at "
            "model.moe.router.capacity_factor (name: expert_choice) "
            "(allowed: name, top_k, expert_choice)",
        ),
        (
            "model.dim: 3",
            "x.yaml:1: model.dim: unknown key; dots join keys on the command line only, in a file "
            "keys are nested; did you mean 'model'? "
            "(allowed: run, model, train, sources, named)",
        ),
        (
            "sources:\n- path: a\n- path: b\n  wieght: 1",
            "x.yaml:4: sources.1.wieght: unknown key; did you mean 'weight'? "
            "(allowed: path, weight)",
        ),
        (
            "named: {web: {path: a, wieght: 1}}",
            "x.yaml:1: named.web.wieght: unknown key; did you mean 'weight'? "
            "(allowed: path, weight)",
        ),
        (
            "model:\n  moe:\n    router:\n      name: top",
            "x.yaml:4: model.moe.router.name: unknown name 'top'; did you mean 'topk'? "
            "(allowed: topk, expert_choice)",
        ),
        (
            "model: {moe: {router: {top_k: 1}}}",
            "x.yaml:1: model.moe.router.name: required, but not given "
            "(allowed: topk, expert_choice)",
        ),
        (
            "\ntrain: {steps: -3}",
            "x.yaml:2: train.steps: input should be greater than 0 (given: -3)",
        ),
        (
            "train: {steps: 1.5}",
            "x.yaml:1: train.steps: input should be a valid integer (given: 1.5)",
        ),
        (
            "train: {steps: '3'}",
            "x.yaml:1: train.steps: input should be a valid integer (given: '3')",
        ),
        ("train: {compile: yes}", "x.yaml:1: train.compile: write true or false (given: 'yes')"),
        ("train: {compile: 1}", "x.yaml:1: train.compile: write true or false (given: 1)"),
        ("train: 3", "x.yaml:1: train: input should be a mapping of keys (given: 3)"),
        ("train:", "x.yaml:1: train: input should be a mapping of keys (given: null)"),
        ("train: {betas: 3}", "x.yaml:1: train.betas: input should be a list (given: 3)"),
        ("train: {betas: [1]}", "x.yaml:1: train.betas.1: required, but not given"),
        ("train: {betas: [.9, .8]}", "x.yaml:1: train.betas: betas (0.9, 0.8) must not fall"),
        (
            "sources: [{path: a, weight: .nan}]",
            "x.yaml:1: sources.0.weight: input should be a finite number (given: NaN)",
        ),
        ("sources:\n- {weight: 1}", "x.yaml:2: sources.0.path: required, but not given"),
        (
            "run: {name: 7}",
            "x.yaml:1: run.name: input should be a valid string "
            "(given: 7; quote it to make it text)",
        ),
        (
            "model: {family: bert}",
            "x.yaml:1: model.family: input should be 'gpt2' or 'llama' (given: 'bert')",
        ),
        (
            "model: {moe: {k: x}}",
            "x.yaml:1: model.moe.k: input should be a valid integer or a list (given: 'x')",
        ),
    ],
)
def test_message(complain, text, message):
    assert complain(text) == message


def test_everything_is_reported_at_once_in_the_order_of_the_file(complain):
    got = complain("train:\n  steps: 0\n  compil: true\nmodel:\n  dim: x\n", "train.betas=0")
    assert [line.split(": ")[0:2] for line in got.splitlines()] == [
        ["command line", "train.betas=0"],
        ["x.yaml:2", "train.steps"],
        ["x.yaml:3", "train.compil"],
        ["x.yaml:5", "model.dim"],
    ]


def test_an_override_is_named_once(complain):
    assert (
        complain("{}", "model.dim=foo")
        == "command line: model.dim=foo: input should be a valid integer (given: 'foo')"
    )
    assert complain("{}", "model={dim: foo}").startswith(
        "command line: model={dim: foo}: model.dim: "
    )
    assert complain("{}", "modle.dim=3").startswith("command line: modle.dim=3: modle: unknown key")


def test_what_a_section_lacks_is_not_blamed_on_an_override(complain):
    got = complain("sources:\n- {weight: 1}", "sources.0.weight=2", "train.steps=1")
    assert got == "x.yaml:2: sources.0.path: required, but not given"


def test_checks_across_sections_name_the_line_of_their_key(complain):
    assert complain("model:\n  dim: 3") == "x.yaml:2: model.dim: dim 3 is odd"
    assert complain("{}", "model.dim=3") == "command line: model.dim=3: dim 3 is odd"
    assert complain("train:\n  steps: 13") == "x.yaml: thirteen steps"


def test_a_key_that_the_user_did_not_write_is_placed_at_its_section(complain):
    got = complain("model:\n  moe:\n    num_experts: 1")
    assert got == "x.yaml:2: model.moe.router.top_k: top_k 2 > 1 experts"


def test_a_key_named_like_a_choice_is_not_taken_for_it(complain):
    got = complain("model: {moe: {router: {name: topk, expert_choice: x}}}")
    assert got.startswith("x.yaml:1: model.moe.router.expert_choice: input should be")
