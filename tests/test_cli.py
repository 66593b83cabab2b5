"""Every verb of `dmoe`: what it prints, JSON that is nothing but JSON, and its exit status."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import yaml

from dmoe.cli import main
from dmoe.metrics.console import printable

STEPS = 4


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Return the result; anything else on standard output would not parse."""
        assert self.status == 0, self.err
        return json.loads(self.out)


def dmoe(*arguments: object, stdin: str = "") -> Outcome:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", io.StringIO(stdin)):
        status = main([str(argument) for argument in arguments])
    return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, the store made of it, a configuration, and a run of it."""
    folder = tmp_path_factory.mktemp("cli")
    paragraphs = (f"paragraph {i}: " + "one two three four; " * (1 + i % 5) for i in range(100))
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    assert prepare_store(folder, "--holdout", 0.1).status == 0
    moe = {"num_experts": 4, "expert_ffn_dim": 16, "router": {"name": "top_k", "top_k": 2}}
    config = {
        "run": {"name": "tiny", "dir": str(folder)},
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "moe": moe},
        "data": {"sources": [{"path": str(folder / "store")}]},
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "seq_len": 32},
        "eval": {"sample_tokens": 3},
        "metrics": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    trained = dmoe("train", folder / "run.yaml")
    assert trained.status == 0, trained.err
    assert "held-out loss" in trained.out
    return folder


def prepare_store(folder: Path, *options: object) -> Outcome:
    arguments = (folder / "text.txt", "-o", folder / "store", "--split-paragraphs", *options)
    return dmoe("data", "prepare", *arguments)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "tiny"


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEPS:08d}"


def test_eval_prints_one_row(run: Path, checkpoint: Path) -> None:
    [row] = dmoe("eval", run, "--json").json()
    assert (row["step"], row["k"]) == (STEPS, 2)
    assert 4 < row["eval_loss"] < 7
    assert row["eval_bits_per_byte"] > 0
    assert dmoe("eval", checkpoint, "--json").json() == [row]
    shown = dmoe("eval", run)
    assert shown.status == 0
    assert f"eval_loss={row['eval_loss']}" in shown.out
    [part] = dmoe("eval", run, "--max-batches", 1, "--json").json()
    assert part["num_targets"] < row["num_targets"]


def test_eval_measures_what_training_did(run: Path) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    [row] = dmoe("eval", run, "--json").json()
    assert row["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)


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


def test_inspect_lists_the_tensors(run: Path) -> None:
    info = dmoe("checkpoint", "inspect", run, "--json").json()
    assert info["step"] == STEPS
    assert info["parts"]["progress"]["step"] == STEPS
    assert info["tensors"]["model.embed.weight"]["shape"] == [257, 16]
    assert set(info["bytes_by_kind"]) == {"model", "optimizer"}
    shown = dmoe("checkpoint", "inspect", run)
    assert shown.status == 0
    assert "model.embed.weight [257, 16]" in shown.out


@pytest.fixture
def damaged(checkpoint: Path) -> Iterator[Path]:
    """A file of the checkpoint with one bit changed, for the length of a test."""
    [path] = checkpoint.glob("*.safetensors")
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    yield path
    path.write_bytes(intact)


def test_verify_finds_an_intact_checkpoint_intact(run: Path, checkpoint: Path) -> None:
    result = dmoe("checkpoint", "verify", run, "--json").json()
    assert result == {"path": str(checkpoint), "problems": []}
    assert "is intact" in dmoe("checkpoint", "verify", run).out


def test_verify_names_the_damaged_file(run: Path, damaged: Path) -> None:
    shown = dmoe("checkpoint", "verify", run)
    assert shown.status == 1
    assert damaged.name in shown.out
    as_json = dmoe("checkpoint", "verify", run, "--json")
    assert as_json.status == 1
    [problem] = json.loads(as_json.out)["problems"]
    assert damaged.name in problem


def test_a_damaged_checkpoint_is_not_used(run: Path, damaged: Path) -> None:
    for arguments in (("eval", run), ("generate", run, "--prompt", "x")):
        outcome = dmoe(*arguments)
        assert outcome.status == 1
        assert damaged.name in outcome.err
        assert outcome.out == ""


def test_a_damaged_description_is_not_used(run: Path, checkpoint: Path) -> None:
    path = checkpoint / "metadata.json"
    intact = path.read_text()
    path.write_text(intact.replace('"num_heads": 2', '"num_heads": 3'))
    outcome = dmoe("eval", run)
    path.write_text(intact)
    assert outcome.status == 1
    assert outcome.err.startswith("failed: ")


@pytest.mark.parametrize("verb", ["eval", "generate", "checkpoint inspect", "checkpoint verify"])
def test_a_missing_run_is_the_users_mistake(verb: str, tmp_path: Path) -> None:
    outcome = dmoe(*verb.split(), tmp_path / "nowhere", "--json")
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert str(tmp_path / "nowhere") in outcome.err
    assert outcome.out == ""


def test_prepare_says_what_it_wrote(folder: Path) -> None:
    splits = prepare_store(folder, "--holdout", 0.1, "--json").json()["splits"]
    assert splits["train"]["documents"] + splits["valid"]["documents"] == 100
    shown = prepare_store(folder, "--holdout", 0.1)
    assert f"train: {splits['train']['documents']} documents" in shown.out
    other = prepare_store(folder, "--holdout", 0.2)
    assert other.status == 2
    assert "already there" in other.err


def test_config_show_is_the_whole_configuration(folder: Path, run: Path) -> None:
    shown = dmoe("config", "show", folder / "run.yaml", "optim.lr=3e-4")
    assert shown.status == 0
    tree = yaml.safe_load(shown.out)
    assert tree["optim"]["lr"] == 3e-4
    assert tree["checkpoint"]["keep_last"] == 2
    assert dmoe("config", "show", folder / "run.yaml", "optim.lr=3e-4", "--json").json() == tree
    saved = dmoe("config", "show", run / "config.yaml", "--json").json()
    assert saved == dmoe("config", "show", folder / "run.yaml", "--json").json()


def test_config_show_checks_the_world(folder: Path) -> None:
    assert dmoe("config", "show", folder / "run.yaml", "--world", 2).status == 0
    outcome = dmoe("config", "show", folder / "run.yaml", "--world", 4)
    assert outcome.status == 2
    assert "train.global_batch_size" in outcome.err


def test_schema_is_for_editors() -> None:
    schema = dmoe("config", "schema").json()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"extends", "run", "model", "train"} <= schema["properties"].keys()


def test_estimate_counts(folder: Path) -> None:
    result = dmoe("estimate", folder / "run.yaml", "--json").json()
    assert result["num_params"] > result["num_active_params"] > 0
    more = dmoe("estimate", folder / "run.yaml", "model.moe.num_experts=8", "--json").json()
    assert more["num_params"] > result["num_params"]
    shown = dmoe("estimate", folder / "run.yaml", "--world", 2)
    assert shown.status == 0
    assert "world 2" in shown.out


@pytest.mark.slow
def test_doctor_checks_this_machine(tmp_path: Path) -> None:
    checks = dmoe("doctor", "--folder", tmp_path, "--json").json()
    assert {"python", "torch", "communication"} <= {check["name"] for check in checks}


@pytest.mark.parametrize("verb", ["train", "estimate", "config show"])
def test_a_mistake_in_the_file_is_told_with_its_line(verb: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train:\n  stesp: 3\n")
    outcome = dmoe(*verb.split(), tmp_path / "bad.yaml")
    assert outcome.status == 2
    assert f"error: {tmp_path / 'bad.yaml'}:2: train.stesp: unknown key" in outcome.err
    assert "'steps'" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    "arguments", ["nonsense", "train", "eval", "eval x --bogus", "eval x --max-batches 0"]
)
def test_misuse_exits_with_two(arguments: str) -> None:
    outcome = dmoe(*arguments.split())
    assert outcome.status == 2
    assert "Usage" in outcome.err


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "train",
        "eval",
        "generate",
        "estimate",
        "doctor",
        "config",
        "config show",
        "config schema",
        "data prepare",
        "checkpoint inspect",
        "checkpoint verify",
    ],
)
def test_every_verb_has_help(verb: str) -> None:
    outcome = dmoe(*verb.split(), "--help")
    assert outcome.status == 0
    assert "Usage" in outcome.out
