"""Every verb of `dmoe`: what it prints, JSON that is nothing but JSON, and its exit status."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command import STEPS, dmoe, prepare_store


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


def test_a_router_with_a_warning_says_it_in_training_and_in_use(folder: Path) -> None:
    router = ["model.moe.router.name=expert_choice", "run.name=looks_ahead", "train.steps=1"]
    trained = dmoe("train", folder / "run.yaml", *router)
    assert trained.status == 0, trained.err
    assert "WARNING: model.moe.router.name = expert_choice is not causal" in trained.out
    evaluated = dmoe("eval", folder / "looks_ahead", "--json")
    assert len(evaluated.json()) == 1
    assert "WARNING: model.moe.router.name = expert_choice is not causal" in evaluated.err
