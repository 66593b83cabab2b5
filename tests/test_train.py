"""`python -m dmoe.train` as users start it: in one process, under torchrun, and wrongly."""

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dmoe.config import load_config
from dmoe.data import prepare
from dmoe.train import main, train

STEPS = 6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    paragraphs = (f"paragraph {i}: " + "one two three four; " * (1 + i % 5) for i in range(100))
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    prepare([folder / "text.txt"], folder / "store", holdout=0.1, split_paragraphs=True)
    return folder / "store"


@pytest.fixture
def config(store: Path, tmp_path: Path) -> Path:
    """A configuration that trains in a second."""
    moe = {"num_experts": 4, "expert_ffn_dim": 16, "router": {"name": "top_k", "top_k": 2}}
    tree = {
        "run": {"name": "tiny", "dir": str(tmp_path)},
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "moe": moe},
        "data": {"sources": [{"path": str(store)}]},
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "seq_len": 32},
        "eval": {"prompt": "paragraph", "sample_tokens": 8},
        "metrics": {"log_every": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def start(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def torchrun(num_processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return start(
        "torch.distributed.run",
        f"--nproc-per-node={num_processes}",
        f"--master-port={port}",
        "-m",
        "dmoe.train",
        *arguments,
    )


def check_output(out: str, folder: Path) -> None:
    loss = re.search(r"held-out loss: (\d\.\d{4}) nats a token = (\d\.\d{4}) bits a byte", out)
    assert loss is not None, out
    assert re.search(r"byte bigrams on the same text: \d\.\d{4} bits a byte", out)
    assert "sample:\nparagraph" in out
    assert f"run folder: {folder}\n" in out
    assert f"tensorboard --host localhost --logdir {folder / 'tensorboard'}\n" in out


def finished(folder: Path) -> bool:
    status = json.loads((folder / "status.json").read_text())
    return (status["state"], status["step"]) == ("finished", STEPS)


def test_trains_says_what_came_out_and_is_not_trained_twice(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = start("dmoe.train", config)
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, tmp_path / "tiny")
    assert finished(tmp_path / "tiny")
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    files = {".lock", "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "status.json"}
    assert names == files

    metrics = (tmp_path / "tiny" / "metrics.jsonl").read_text()
    assert main([str(config)]) == 0
    again = capsys.readouterr().out
    assert f"resumed at step {STEPS} of {STEPS}" in again
    check_output(again, tmp_path / "tiny")
    assert finished(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "metrics.jsonl").read_text() == metrics


def test_two_processes_with_expert_parallelism(config: Path, tmp_path: Path) -> None:
    done = torchrun(2, config, "parallel.ep=2", "engine.zero_stage=2")
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, tmp_path / "tiny")
    assert done.stdout.count("held-out loss") == 1, "one rank speaks"
    assert "world 2 = edp 1 x ep 2 | dense over 2 | 4 experts, 2 per rank" in done.stdout
    assert finished(tmp_path / "tiny")


def test_a_mistake_is_told_with_its_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train:\n  steps: 3\n  stepps: 4\n")
    done = start("dmoe.train", tmp_path / "bad.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'bad.yaml'}:3: train.stepps: unknown key")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", "command line: train.steps=many"),
        ("parallel.ep=2", "parallel.ep = 2 does not divide the number of ranks, 1"),
        ("data.sources=[{path: /nowhere}]", "/nowhere"),
        ("data.tokenizer=/nowhere.json", "/nowhere.json"),
        ("model.vocab_size=100", "model.vocab_size 100 is less than the 257 ids"),
        ("checkpoint.resume=must", "checkpoint.resume is 'must'"),
    ],
)
def test_bad_input_exits_with_two(
    override: str, message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), override]) == 2
    assert message in capsys.readouterr().err


def test_without_arguments_it_tells_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "CONFIG [a.b=c ...]" in capsys.readouterr().out


@pytest.mark.slow
def test_damage_that_one_rank_finds_is_told(store: Path, config: Path, tmp_path: Path) -> None:
    """Ranks share the hashing of files, and only rank 0 speaks.

    One token moves from the second document to the first: the index is sound, but not the one that
    was saved. It is the second file, which rank 1 hashes.
    """
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    index = bytearray((damaged / "train.idx").read_bytes())
    [count] = struct.unpack_from("<Q", index, 18)
    first, second = struct.unpack_from("<2i", index, 34)
    struct.pack_into("<2i", index, 34, first + 1, second - 1)
    [start] = struct.unpack_from("<q", index, 34 + 4 * count + 8)
    struct.pack_into("<q", index, 34 + 4 * count + 8, start + 2)
    (damaged / "train.idx").write_bytes(index)
    done = torchrun(2, config, f"data.sources=[{{path: {damaged}}}]", "parallel.ep=2")
    assert done.returncode != 0
    told = r"^error: .*rank 1.*train\.idx: altered between byte"
    assert re.search(told, done.stderr, re.MULTILINE), done.stderr
    assert "Gloo" not in done.stderr, "no rank runs on into one that has gone"


def test_a_run_that_is_shortened_after_it_has_passed_its_end(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint it goes back to was not evaluated."""
    longer = load_config(config, ["checkpoint.every=4", "metrics.tensorboard=false"])
    train(longer)
    checkpoints = longer.run.folder / "checkpoints"
    shutil.rmtree(checkpoints / f"step_{STEPS:08d}")
    (checkpoints / "latest").write_text("step_00000004")
    capsys.readouterr()
    train(load_config(config, ["train.steps=4", "metrics.tensorboard=false"]))
    assert "held-out loss" in capsys.readouterr().out
