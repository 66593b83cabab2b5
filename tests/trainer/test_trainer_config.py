"""Checks that span sections: both numbers, the key to change, and its place in the file."""

import re
from pathlib import Path

import pytest
import yaml

from dmoe.config import ConfigError, load_config
from dmoe.trainer.config import Config


def load_text(folder: Path, text: str) -> Config:
    (folder / "run.yaml").write_text(text)
    return load_config(folder / "run.yaml")


def parsed(text: str) -> Config:
    return Config.model_validate(yaml.safe_load(text))


CONFLICTS = {
    "batch": (
        "train:\n  micro_batch_size: 8\n  global_batch_size: 20\n",
        3,
        "train.global_batch_size",
        ["train.global_batch_size = 20", "train.micro_batch_size = 8"],
    ),
    "length": (
        "model:\n  max_seq_len: 64\ntrain:\n  seq_len: 65\n",
        4,
        "train.seq_len",
        ["train.seq_len = 65", "model.max_seq_len = 64"],
    ),
    "experts": (
        "parallel: {ep: 4}\nmodel:\n  moe:\n    num_experts: 6\n    expert_ffn_dim: 8\n",
        4,
        "model.moe.num_experts",
        ["model.moe.num_experts = 6", "parallel.ep = 4"],
    ),
    "sub-keys": (
        "parallel: {ep: 3}\nmodel:\n  moe:\n    num_experts: 10000\n    expert_ffn_dim: 1\n"
        "    router: {name: peer}\n",
        4,
        "model.moe.num_experts",
        [
            "model.moe.num_experts = 10000 ",
            "100 first sub-keys",
            "100 is not a multiple of",
            "ep = 3",
        ],
    ),
    "top_k": (
        "model:\n  moe:\n    num_experts: 4\n    expert_ffn_dim: 8\n"
        "    router: {name: top_k, top_k: 5}\n",
        5,
        "model.moe.router.top_k",
        ["router.top_k = 5", "num_experts = 4"],
    ),
    "eval.k": (
        "model:\n  moe: {num_experts: 4, expert_ffn_dim: 8}\neval:\n  k: [2, 5]\n",
        4,
        "eval.k",
        ["k = 5", "num_experts = 4"],
    ),
    "eval.k of a dense model": (
        "eval:\n  k: [1]\n",
        2,
        "eval.k",
        ["k = 1", "dense"],
    ),
    "name": (
        "run:\n  name: a/b\n",
        2,
        "run.name",
        ["'a/b'", "run.dir"],
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_conflict_says_both_numbers_the_key_and_the_place(case: str, tmp_path: Path) -> None:
    text, line, key, facts = CONFLICTS[case]
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'run.yaml'}:{line}: {key}: "), message
    for fact in facts:
        assert fact in message
    assert len(message.splitlines()) == 1


def test_a_conflict_from_the_command_line_names_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {seq_len: 64}\n")
    with pytest.raises(
        ConfigError, match=r"command line: train\.global_batch_size=33.* = 33 .* = 8"
    ):
        load_config(tmp_path / "run.yaml", ["train.global_batch_size=33"])


def test_the_defaults_agree_with_each_other() -> None:
    assert Config().train.num_micro_batches == 4


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/", "new\nline"])
def test_a_run_name_is_one_folder(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"not the name of one folder; put its parent into run\.dir"
    ):
        Config.model_validate({"run": {"name": name}})


def test_run_folder_is_the_name_inside_the_folder_of_runs() -> None:
    config = Config.model_validate({"run": {"name": "a b.1", "dir": "some/where"}})
    assert config.run.folder == Path("some/where/a b.1")


WORLD = "train: {micro_batch_size: 2, global_batch_size: 12}\nparallel: {ep: 2}\n"
WORLD += "model: {moe: {num_experts: 4, expert_ffn_dim: 8}}\n"


def test_worlds_that_fit() -> None:
    for world_size in (2, 6):
        parsed(WORLD).check_world(world_size)


def test_a_world_that_ep_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep = 2 .* number of ranks, 3.*torchrun"):
        parsed(WORLD).check_world(3)


def test_a_world_that_cannot_share_the_micro_batches() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(WORLD).check_world(4)
    for fact in (
        "train.global_batch_size = 12 makes 6 micro-batches of train.micro_batch_size = 2",
        "4 ranks",
        "a multiple of 8",
    ):
        assert fact in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {num_layers: 3, moe: {every: 4, num_experts: 4, expert_ffn_dim: 8}}",
            "none of the num_layers = 3 layers is a MoE layer with moe.every = 4",
        ),
        ("parallel: {ep: 2}", "parallel.ep = 2, but the model has no experts"),
        ("checkpoint: {resume: never, resume_from: a}", "resume = never, but resume_from = a"),
        (
            "model: {moe: {num_experts: 4, expert_ffn_dim: 12}}",
            "expert_ffn_dim = 12 is not a multiple of 8",
        ),
    ],
)
def test_what_cannot_work_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(text)
