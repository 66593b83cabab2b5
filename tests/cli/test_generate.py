"""`dmoe generate`: prompts, stops, and the number of experts per token."""

from pathlib import Path

import pytest
from command import dmoe

from dmoe.metrics.console import printable


def test_generate_continues_each_prompt(run: Path) -> None:
    options = ("--max-new-tokens", 8, "--seed", 3)
    rows = dmoe("generate", run, "--prompt", "one", "--prompt", "two ", *options, "--json").json()
    assert [row["prompt"] for row in rows] == ["one", "two "]
    [alone] = dmoe("generate", run, "--prompt", "two ", *options, "--json").json()
    assert alone["text"] == rows[1]["text"]
    shown = dmoe("generate", run, "--prompt", "one", *options)
    assert shown.out == printable(f"one{rows[0]['text']}\n"), "control characters are escaped"


def test_generate_reads_standard_input(run: Path) -> None:
    options = ("--max-new-tokens", 4, "--json")
    [read] = dmoe("generate", run, *options, stdin="from a pipe").json()
    assert read["prompt"] == "from a pipe"
    [given] = dmoe("generate", run, "--prompt", "from a pipe", *options).json()
    assert given["text"] == read["text"]


def test_generate_stops_at_a_string(run: Path) -> None:
    options = ("--prompt", "one", "--temperature", 0, "--max-new-tokens", 8, "--json")
    [row] = dmoe("generate", run, *options).json()
    stop = row["text"][1]
    [stopped] = dmoe("generate", run, *options, "--stop", stop).json()
    assert stopped["text"] == row["text"][: row["text"].index(stop)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--max-new-tokens", "0"),
        ("--top-p", "1.5"),
        ("--top-k", "0"),
        ("--stop", ""),
    ],
)
def test_generate_names_the_bad_option(option: str, value: str, run: Path) -> None:
    outcome = dmoe("generate", run, "--prompt", "x", option, value)
    assert outcome.status == 2
    assert f"error: {option}: " in outcome.err
    assert outcome.out == ""


def text_at(run: Path, *options: object) -> str:
    greedy = ("--prompt", "one", "--temperature", 0, "--max-new-tokens", 12, "--json")
    [row] = dmoe("generate", run, *greedy, *options).json()
    return row["text"]


def test_generate_at_any_number_of_experts(run: Path, tmp_path: Path) -> None:
    own = text_at(run)
    assert text_at(run, "--k", 2) == text_at(run, "--k", "2,2") == own
    profile = tmp_path / "k_profile.yaml"
    for k in ("1", "4,1", "1,4"):
        profile.write_text(f"k: [{k if ',' in k else f'{k}, {k}'}]\n")
        assert text_at(run, "--profile", profile) == text_at(run, "--k", k)
    assert len({text_at(run, "--k", k) for k in ("1", "4,1", "1,4", "4")}) > 1


def test_generate_with_a_threshold(run: Path) -> None:
    """So close to 1 that each token has its best expert alone: the scores of no two are equal."""
    nearly_one = 1 - 1e-7
    assert text_at(run, "--k", 4, "--threshold", nearly_one) == text_at(run, "--k", 1)
    assert text_at(run, "--threshold", 0) == text_at(run)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (("--k", "5"), ["k = 5", "num_experts = 4"]),
        (("--k", "2,0"), ["k = 0", "num_experts = 4"]),
        (("--k", "2,2,2"), ["3 numbers", "2 MoE layers"]),
        (("--k", "two"), ["--k", "'two'", "1,2,4"]),
        (("--k", "2", "--profile", "x.yaml"), ["--k and --profile"]),
        (("--profile", "nowhere.yaml"), ["nowhere.yaml"]),
        (("--threshold", "1"), ["threshold = 1.0", "[0, 1)"]),
    ],
)
def test_generate_refuses_experts_that_the_model_has_not(options, facts, run: Path) -> None:
    outcome = dmoe("generate", run, "--prompt", "x", *options)
    assert outcome.status == 2
    assert outcome.out == ""
    for fact in facts:
        assert fact in outcome.err
