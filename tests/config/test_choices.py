from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dmoe.config import ConfigModel
from dmoe.config.base import names_of
from dmoe.config.choices import allowed_keys, key_paths, sections_of, sections_under


class TopK(ConfigModel):
    name: Literal["topk", "switch"] = "topk"
    top_k: int = 2


class Choice(ConfigModel):
    name: Literal["expert_choice"] = "expert_choice"
    factor: float = 1.0


class Source(ConfigModel):
    name: str = ""
    weight: float = 1.0


class Root(ConfigModel):
    router: Annotated[TopK | Choice, Field(discriminator="name")] | None = None
    sources: list[Source] | None = None
    child: Root | None = None
    steps: int = 1


def test_sections_are_found_inside_any_annotation():
    assert sections_of(TopK | None) == (TopK,)
    assert sections_of(dict[str, list[TopK | Choice]]) == (TopK, Choice)
    assert sections_of(int | list[str]) == ()
    assert sections_under((Root,), "router") == (TopK, Choice)
    assert sections_under((Root,), "steps") == ()


def test_names_and_keys():
    assert names_of(TopK) == ("topk", "switch")
    assert names_of(Source) == ()
    assert allowed_keys((TopK, Choice)) == ["name", "top_k", "factor"]


def test_key_paths_show_lists_and_choices_and_end_on_recursion():
    paths = dict(key_paths((Root,)))
    assert paths["top_k"] == "router.top_k (name: topk or switch)"
    assert paths["weight"] == "sources.0.weight"
    assert paths["steps"] == "steps"
