"""Nothing in the package unpickles, evaluates text or calls a shell."""

import contextlib
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

import dmoe
from dmoe.checkpoint import CheckpointConfig, CheckpointManager, CorruptCheckpointError
from dmoe.checkpoint.manifest import Manifest, hash_files

SHARD = "shard-00001-model-00001-of-00001.safetensors"
FORBIDDEN = re.compile(
    r"\bpickle\.|\bimport (cloud)?pickle\b|\bfrom pickle\b|torch\.load\("
    r"|yaml\.(unsafe_|full_)?load\(|(?<![\w.])(eval|exec)\(|shell=True|os\.system\(|weights_only=False|_object(_list)?\("
)


def test_the_source_has_no_way_to_run_data():
    for path in Path(dmoe.__file__).parent.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not FORBIDDEN.search(line), f"{path}:{number}: {line}"


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


def test_a_bomb_works_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "shard-00001-model-00001-of-00001.safetensors",
        "metadata.json",
        "config.yaml",
        "manifest.json",
        ".metadata",
        "x.pt",
        "x.distcp",
    ],
)
def test_a_bomb_in_a_checkpoint_does_not_go_off(tmp_path, name, signed):
    manager = CheckpointManager(tmp_path / "run", CheckpointConfig())
    state = {"w": torch.ones(2)}
    manager.save(1, state, {}, {})
    folder = manager.latest()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    if signed and name != "manifest.json":
        files = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
        (folder / "manifest.json").write_bytes(Manifest(1, hash_files(folder, files)).encode())
        with contextlib.suppress(RuntimeError):
            manager.load("latest", state)
    else:
        with pytest.raises(CorruptCheckpointError, match=name):
            manager.load("latest", state)
    manager.close()
    assert not (tmp_path / "canary").exists()
