"""The corruption matrix: every file of a checkpoint, damaged in every way."""

import hashlib
import json
import logging
import os
import shutil

import pytest
import torch

from dmoe.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointManager,
    CorruptCheckpointError,
    verify_checkpoint,
)
from dmoe.checkpoint.manifest import MANIFEST, Manifest, find_problems, hash_files, read_manifest

FILES = [
    "shard-00001-model-00001-of-00001.safetensors",
    "metadata.json",
    "config.yaml",
    "manifest.json",
]


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path, start):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: int(size * start)].ljust(size, b"\0"))


DAMAGES = {
    "bit flip": flip_bit,
    "truncate half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zero tail": lambda path: zero(path, 0.9),
    "zero all": lambda path: zero(path, 0.0),
    "delete": lambda path: path.unlink(),
    "swap": lambda path: shutil.copy(path.parents[1] / "step_00000001" / path.name, path),
    "extra": lambda path: path.with_name(f"extra-{path.name}").write_bytes(b"x"),
    "duplicate": lambda path: shutil.copy(path, path.with_name(f"copy-{path.name}")),
    "link": lambda path: (
        path.rename(path.parents[1] / "moved"),
        path.symlink_to(path.parents[1] / "moved"),
    ),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


def tensors(step):
    return {"model.w": torch.full((64,), float(step)), "model.steps": torch.tensor(step)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    manager = CheckpointManager(root, CheckpointConfig())
    for step in (1, 2):
        manager.save(step, tensors(step), {"progress": {"step": step}}, {"saved_at": step})
    manager.close()
    return root


@pytest.fixture
def root(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_step_before_is_resumed(root, name, damage, caplog):
    folder = root / "step_00000002"
    DAMAGES[damage](folder / name)
    problems = verify_checkpoint(folder)
    assert len(problems) == 1
    named = {"extra": f"extra-{name}", "duplicate": f"copy-{name}"}.get(damage, name)
    assert problems[0].file == named

    manager = CheckpointManager(root, CheckpointConfig())
    state = tensors(0)
    with pytest.raises(CorruptCheckpointError, match=named):
        manager.load("latest", state)
    assert state["model.w"].eq(0).all()
    with caplog.at_level(logging.WARNING):
        assert manager.resume(state) == {"progress": {"step": 1}}
    assert named in caplog.text
    assert state["model.w"].eq(1).all()
    manager.close()


def test_intact(two_steps):
    for folder in two_steps.glob("step_*"):
        assert verify_checkpoint(folder) == []
    # A copy under another name is as good; under the name of another step it is not.
    named = shutil.copytree(two_steps / "step_00000001", two_steps / "good_one")
    assert verify_checkpoint(named) == []
    posing = shutil.copytree(two_steps / "step_00000001", two_steps / "step_00000077")
    assert "of step 1, not of step_00000077" in str(verify_checkpoint(posing))
    shutil.rmtree(named)
    shutil.rmtree(posing)


def test_no_folder(tmp_path):
    assert "is not a folder" in str(find_problems(tmp_path / "absent"))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"[" * 100_000, b'{"files": 3}', b"\xff\xfe", b"null"]
)
def test_a_manifest_that_is_none(root, text):
    (root / "step_00000002" / MANIFEST).write_bytes(text)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        read_manifest(root / "step_00000002")


def test_names_in_a_manifest_do_not_lead_out_of_the_folder(root):
    folder = root / "step_00000002"
    outside = hash_files(root, ["latest"])["latest"]
    files = {**read_manifest(folder).files, "../latest": outside}
    (folder / MANIFEST).write_bytes(Manifest(2, files).encode())
    assert [problem.file for problem in verify_checkpoint(folder)] == ["../latest"]


def test_another_format_is_not_taken_for_damage(root):
    path = root / "step_00000002" / MANIFEST
    manifest = read_manifest(path.parent)
    content = json.loads(manifest.encode())
    content["format_version"] = 99
    path.write_text(json.dumps(_signed(content)))
    manager = CheckpointManager(root, CheckpointConfig())
    with pytest.raises(CheckpointError, match="has format 99; this dmoe reads 1"):
        manager.resume(tensors(0))
    manager.close()


def _signed(content):
    content.pop("sha256")
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
