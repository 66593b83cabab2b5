import errno
import logging
import os
import resource
import threading

import pytest
import torch
import torch.distributed as dist

from dmoe.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointManager,
    load_checkpoint,
    verify_checkpoint,
)
from dmoe.config.base import ConfigError
from dmoe.testing import run_distributed


@pytest.fixture
def managers(tmp_path):
    made = []

    def make(failpoint=lambda name: None, **config):
        made.append(
            CheckpointManager(
                tmp_path / "checkpoints", CheckpointConfig(**config), failpoint=failpoint
            )
        )
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def state(value, size=64):
    return {"model.w": torch.full((size,), float(value))}


def save(manager, step, **kwargs):
    manager.save(step, state(step), {"progress": {"step": step}}, {"step": step}, **kwargs)


def steps(manager):
    return sorted(int(path.name[5:]) for path in manager.root.glob("step_*"))


def hidden(manager):
    return [path.name for path in manager.root.glob(".*")]


class Gate:
    """A failpoint that holds the background save until it is opened."""

    def __init__(self, name="after_shards"):
        self.name = name
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, name):
        if name == self.name:
            self.reached.set()
            assert self.open.wait(60)


# --- save, load, resume


def test_save_and_load(managers):
    manager = managers()
    assert manager.latest() is None
    assert manager.best() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        manager.load("latest", state(0))
    save(manager, 1)
    save(manager, 2)
    tensors = state(0)
    assert manager.load("latest", tensors) == {"progress": {"step": 2}}
    assert tensors["model.w"].eq(2).all()
    assert manager.load(manager.root / "step_00000001", tensors) == {"progress": {"step": 1}}
    assert tensors["model.w"].eq(1).all()
    metadata = load_checkpoint(manager.latest(), tensors)
    assert (metadata.step, metadata.eval_loss) == (2, None)


def test_the_same_step_after_a_rollback(managers):
    manager = managers()
    for step in (1, 2, 3, 2):
        save(manager, step)
    assert manager.latest().name == "step_00000002"
    assert steps(manager) == [2, 3]
    assert managers().resume(state(0)) == {"progress": {"step": 2}}


@pytest.mark.parametrize("policy", ["auto", "must", "never"])
def test_resume_policies(managers, tmp_path, policy):
    manager = managers(resume=policy)
    if policy == "must":
        with pytest.raises(ConfigError, match=r"checkpoint\.resume is 'must', but .* holds no"):
            manager.resume(state(0))
    else:
        assert manager.resume(state(0)) is None
    save(manager, 1)
    tensors = state(0)
    parts = managers(resume=policy).resume(tensors)
    assert parts == (None if policy == "never" else {"progress": {"step": 1}})
    assert tensors["model.w"].eq(0 if policy == "never" else 1).all()


def test_resume_from_another_run_until_there_is_an_own_one(managers, tmp_path):
    other = CheckpointManager(tmp_path / "other", CheckpointConfig())
    save(other, 9)
    manager = managers(resume="must", resume_from=other.latest())
    assert manager.resume(state(0)) == {"progress": {"step": 9}}
    save(manager, 1)
    assert manager.resume(state(0)) == {"progress": {"step": 1}}
    other.close()


def test_resume_when_only_the_pointer_is_missing_or_bad(managers, caplog):
    manager = managers()
    save(manager, 1)
    save(manager, 2)
    (manager.root / "latest").write_text("../../elsewhere")
    assert manager.resume(state(0)) == {"progress": {"step": 2}}
    assert "elsewhere" in caplog.text
    with pytest.raises(CheckpointError, match="elsewhere"):
        manager.load("latest", state(0))
    (manager.root / "latest").unlink()
    assert manager.resume(state(0)) == {"progress": {"step": 2}}


def test_resume_with_none_intact_says_so(managers):
    manager = managers()
    for step in (1, 2):
        save(manager, step)
        (manager.root / f"step_0000000{step}" / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"none|no checkpoint .* is intact.*metadata\.json"):
        manager.resume(state(0))


def test_a_model_that_does_not_fit_is_no_reason_to_go_back(managers):
    manager = managers()
    save(manager, 1)
    save(manager, 2)
    with pytest.raises(CheckpointError, match=r"saved torch.float32 \[64\], expected .* \[65\]"):
        manager.resume(state(0, size=65))


def test_parts_that_are_no_json_are_refused_before_anything_is_written(managers):
    manager = managers()
    with pytest.raises(CheckpointError, match="cannot be saved"):
        manager.save(1, state(1), {"rng": torch.ones(1)}, {})
    assert steps(manager) == []


# --- retention


def test_retention_keeps_last_every_and_best(managers):
    manager = managers(keep_last=2, keep_every=30)
    for step, loss in [(10, 3.0), (20, 2.0), (30, 2.5), (40, None), (50, 2.2), (60, 2.1)]:
        save(manager, step, eval_loss=loss)
    assert steps(manager) == [20, 30, 50, 60]
    assert manager.best().name == "step_00000020"
    assert hidden(manager) == []


def test_retention_spares_the_one_being_loaded(managers):
    """A load waits for the save under way, so nothing is deleted while it reads."""
    gate = Gate()
    manager = managers(gate, keep_last=1, async_save=True)
    gate.open.set()
    save(manager, 1, block=True)
    gate.open.clear()
    gate.reached.clear()
    save(manager, 2)
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    assert manager.load("latest", state(0)) == {"progress": {"step": 2}}
    assert steps(manager) == [2]


def test_a_failed_deletion_is_harmless(managers, monkeypatch, caplog):
    manager = managers(keep_last=1)
    save(manager, 1)

    def refuse(*args):
        raise PermissionError("read only")

    monkeypatch.setattr("shutil.rmtree", refuse)
    save(manager, 2)
    assert "could not delete" in caplog.text
    assert manager.latest().name == "step_00000002"


def test_a_damaged_neighbour_does_not_stop_retention(managers, caplog):
    manager = managers(keep_last=1)
    save(manager, 1)
    (manager.latest() / "metadata.json").write_text("{")
    save(manager, 2)
    assert "taken as not evaluated" in caplog.text
    assert steps(manager) == [2]


# --- asynchronous saving


def test_async_saves_what_was_at_the_call(managers):
    gate = Gate()
    manager = managers(gate, async_save=True)
    tensors, parts, config = state(1), {"progress": {"step": 1}}, {"step": 1}
    manager.save(1, tensors, parts, config)
    tensors["model.w"].zero_()
    parts["progress"]["step"] = config["step"] = 0
    assert manager.latest() is None  # nothing shows until it is whole
    gate.open.set()
    manager.wait()
    assert manager.load("latest", tensors) == {"progress": {"step": 1}}
    assert tensors["model.w"].eq(1).all()
    assert "step: 1" in (manager.latest() / "config.yaml").read_text()


@pytest.mark.parametrize("surface", ["check", "wait", "save", "close"])
def test_an_async_failure_is_raised_at_the_next_call(managers, monkeypatch, surface):
    manager = managers(async_save=True)
    save(manager, 1, block=True)
    replace = os.replace

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    save(manager, 2)
    calls = {
        "check": lambda: [manager.check() for _ in iter(int, 1)],  # at each step, without an end
        "wait": manager.wait,
        "save": lambda: save(manager, 3),
        "close": manager.close,
    }
    with pytest.raises(CheckpointError, match="saving step 2 failed; earlier checkpoints are kept"):
        calls[surface]()
    monkeypatch.setattr(os, "replace", replace)
    manager.check()  # raised once, not again
    assert manager.latest().name == "step_00000001"
    if surface != "close":
        save(manager, 3, block=True)
        assert manager.latest().name == "step_00000003"


def test_overlapping_saves_wait_and_say_so(managers, caplog):
    gate = Gate()
    manager = managers(gate, async_save=True)
    save(manager, 1)
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    with caplog.at_level(logging.INFO):
        save(manager, 2)
    assert "the save of step 2 waits for the one before it" in caplog.text
    manager.wait()
    assert steps(manager) == [1, 2]


def test_close_finishes_the_save_and_ends_the_thread(managers):
    gate = Gate()
    manager = managers(gate, async_save=True)
    save(manager, 1)
    threading.Timer(0.2, gate.open.set).start()
    manager.close()
    assert verify_checkpoint(manager.latest()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


# --- full disks


def test_too_little_space_is_seen_before_writing(managers, monkeypatch):
    manager = managers()
    save(manager, 1)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Usage", (), {"free": 100 * 2**20})()
    )
    state_of_terabytes = {"model.w": torch.empty(1, device="meta").expand(2**38)}
    with pytest.raises(CheckpointError, match=r"needs 1048576\.0 MiB, 100\.0 MiB are free in"):
        manager.save(2, state_of_terabytes, {}, {})
    assert steps(manager) == [1]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_fills_up_while_writing(managers, async_save):
    manager = managers(async_save=async_save)
    save(manager, 1, block=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))

    def save_much():
        manager.save(2, state(2, size=1 << 20), {}, {})
        manager.wait()

    try:
        with pytest.raises(CheckpointError, match=r"File too large.*needs 4\.0 MiB, .* free in"):
            save_much()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(manager) == [1]
    assert hidden(manager) == []
    assert verify_checkpoint(manager.latest()) == []
    save(manager, 2, block=True)


# --- two ranks


def _two_ranks(root):
    rank = dist.get_rank()
    manager = CheckpointManager(root, CheckpointConfig(async_save=True, keep_last=1))
    save(manager, 1)
    manager.wait()
    write = torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data = fail
    save(manager, 2)
    with pytest.raises(CheckpointError) as caught:
        manager.wait()
    torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data = write
    save(manager, 3)
    # The background save and training's collectives use different groups.
    total = torch.ones(1)
    for _ in range(50):
        dist.all_reduce(total)
    manager.wait()
    if rank == 0:
        (root / "step_00000003" / "config.yaml").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError) as damaged:
        manager.resume(state(0))
    save(manager, 4)
    manager.close()
    return str(caught.value), str(damaged.value)


def test_two_ranks_agree_on_failure_and_damage(tmp_path):
    root = tmp_path / "checkpoints"
    first, second = run_distributed(_two_ranks, 2, root)
    assert first[0].split("MiB, ")[0] == second[0].split("MiB, ")[0]
    assert "failed on rank 1: OSError: [Errno 28] No space left on device" in first[0]
    assert first[1] == second[1]
    assert "config.yaml is missing" in first[1]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000004"]
