import os
from pathlib import Path

import pytest

from dmoe.checkpoint.commit import commit, discard, read_latest, recover, saved_steps
from dmoe.checkpoint.manifest import CorruptCheckpointError, verify
from dmoe.checkpoint.ranks import CheckpointError


def writer(text):
    def write(folder):
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text(text)

    return write


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_commit_is_a_verified_folder_and_the_latest(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    folder = commit(root, 100, writer("x"))
    verify(folder)
    assert folder.name == "step_00000100"
    assert names(folder) == ["a.txt", "b.txt", "manifest.json"]
    assert names(root) == ["latest", "step_00000100"]
    assert read_latest(root) == 100
    assert saved_steps(root) == {100: folder}


def test_the_same_step_is_replaced(tmp_path):
    commit(tmp_path, 1, writer("old"))
    folder = commit(tmp_path, 1, writer("new"))
    verify(folder)
    assert (folder / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_data_is_on_disk_before_the_name_that_shows_it(tmp_path, monkeypatch):
    events = []

    def record(kind, original, target):
        def call(*args):
            events.append((kind, target(*args)))
            return original(*args)

        monkeypatch.setattr(os, kind, call)

    record("fsync", os.fsync, lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name)
    record("rename", os.rename, lambda source, target: Path(target).name)
    record("replace", os.replace, lambda source, target: Path(target).name)
    commit(tmp_path, 1, writer("x"))
    assert events == [
        ("fsync", "a.txt"),
        ("fsync", "b.txt"),
        ("fsync", "manifest.json"),
        ("fsync", ".tmp-step_00000001"),
        ("rename", "step_00000001"),
        ("fsync", tmp_path.name),
        ("fsync", ".tmp-latest"),
        ("replace", "latest"),
        ("fsync", tmp_path.name),
    ]


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch, call, replacing):
    commit(tmp_path, 1, writer("old"))
    original = getattr(os, call)
    failing = iter([True])

    def fail_once(*args):
        if next(failing, False):
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, call, fail_once)
    with pytest.raises(CheckpointError, match=r"rank 0: OSError.*No space left"):
        commit(tmp_path, 1 if replacing else 2, writer("new"))
    for folder in saved_steps(tmp_path).values():
        verify(folder)
    assert read_latest(tmp_path) == 1
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    verify(commit(tmp_path, 2, writer("new")))


def test_a_failure_between_moving_the_old_aside_and_the_new_in_place(tmp_path, monkeypatch):
    commit(tmp_path, 1, writer("old"))
    rename = os.rename

    def fail_to_place(source, target):
        if Path(source).name.startswith(".tmp-step"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_to_place)
    with pytest.raises(CheckpointError, match="Input/output error"):
        commit(tmp_path, 1, writer("new"))
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert (tmp_path / "step_00000001" / "a.txt").read_text() == "old"


def test_recover_restores_what_was_moved_aside_and_deletes_the_rest(tmp_path):
    for step in (1, 2):
        commit(tmp_path, step, writer(str(step)))
        (tmp_path / f"step_0000000{step}").rename(tmp_path / f".old-step_0000000{step}")
    commit(tmp_path, 2, writer("newer"))
    (tmp_path / ".tmp-step_00000003").mkdir()
    (tmp_path / ".tmp-latest").write_text("step_0000")
    (tmp_path / ".keep").touch()
    recover(tmp_path)
    assert names(tmp_path) == [".keep", "latest", "step_00000001", "step_00000002"]
    assert (tmp_path / "step_00000002" / "a.txt").read_text() == "newer"
    recover(tmp_path / "absent")


def test_to_fail_to_delete_is_harmless(tmp_path, monkeypatch, caplog):
    folder = commit(tmp_path, 1, writer("x"))

    def refuse(*args):
        raise PermissionError("read only")

    monkeypatch.setattr("shutil.rmtree", refuse)
    discard(folder)
    assert "could not delete" in caplog.text
    assert saved_steps(tmp_path) == {}  # what may be half deleted is no checkpoint any more


@pytest.mark.parametrize(
    "text",
    ["../elsewhere", "/etc", "step_00000001/..", "step_1", "", "\0" * 13, "step_00000001\nx", "…"],
)
def test_a_pointer_that_is_no_step_is_refused(tmp_path, text):
    commit(tmp_path, 1, writer("x"))
    (tmp_path / "latest").write_text(text)
    with pytest.raises(CorruptCheckpointError, match="not the name of a checkpoint folder"):
        read_latest(tmp_path)


def test_a_link_is_no_checkpoint(tmp_path):
    outside = commit(tmp_path / "other", 1, writer("x"))
    root = tmp_path / "root"
    root.mkdir()
    (root / outside.name).symlink_to(outside)
    (root / "latest").write_text(outside.name)
    assert saved_steps(root) == {}
    with pytest.raises(CorruptCheckpointError):
        read_latest(root)
