"""A process that saves in a loop is killed at every point: what it leaves are whole checkpoints."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dmoe.checkpoint import CheckpointConfig, CheckpointManager, verify_checkpoint
from dmoe.testing import run_distributed

POINTS = ["after_shards", "before_manifest", "before_rename", "after_rename_before_latest"]


def state(step):
    return {"model.w": torch.full((5000,), step), "optimizer.step": torch.tensor(step)}


def save(manager, step):
    manager.save(step, state(step), {"progress": {"step": step}}, {"step": step})


def save_until_killed(root, acknowledged, point, nth, async_save):
    """Save each step twice, the second replacing the first; die at `point` of the nth commit."""
    commits = 0

    def die(name):
        nonlocal commits
        commits += name == POINTS[0]
        if name == point and commits == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    manager = CheckpointManager(root, CheckpointConfig(async_save=async_save), failpoint=die)
    parts = manager.resume(state(0))
    step = parts["progress"]["step"] if parts else 0
    while True:
        step += 1
        for _ in range(2):
            save(manager, step)
            manager.wait()
            acknowledged.value = step


def check_what_is_left(root, acknowledged):
    for folder in root.glob("step_*"):
        assert verify_checkpoint(folder) == []
    manager = CheckpointManager(root, CheckpointConfig())
    assert list(root.glob(".*")) == []
    tensors = state(0)
    parts = manager.resume(tensors)
    if acknowledged == 0 and parts is None:
        return
    step = parts["progress"]["step"]
    assert step in (acknowledged, acknowledged + 1)
    assert manager.latest().name == f"step_{step:08d}"
    assert all(tensor.eq(step).all() for tensor in tensors.values())
    save(manager, step)
    save(manager, step + 1)
    assert verify_checkpoint(manager.latest()) == []
    manager.close()


def fork_server():
    """Start processes fast: the server has loaded torch, and unlike this process holds no locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmoe.checkpoint"])
    return context


def kill_and_check(root, rounds):
    """Kill one process after another in the same folder, each at its (point, nth commit, async)."""
    context = fork_server()
    draw = random.Random(len(rounds))
    for point, nth, async_save in rounds:
        acknowledged = context.Value("q", 0)
        process = context.Process(
            target=save_until_killed, args=(root, acknowledged, point, nth, async_save)
        )
        process.start()
        if point is None:
            deadline = time.monotonic() + 60
            while acknowledged.value == 0 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        check_what_is_left(root, acknowledged.value)


def test_six_kills(tmp_path):
    rounds = [(point, 3 + i % 2, i % 2 == 0) for i, point in enumerate([*POINTS, None, None])]
    kill_and_check(tmp_path / "checkpoints", rounds)


def save_and_exit(root):
    torch.set_num_threads(1)
    manager = CheckpointManager(
        root, CheckpointConfig(async_save=True), failpoint=lambda name: time.sleep(0.05)
    )
    save(manager, 1)


def test_exit_during_a_background_save_finishes_it(tmp_path):
    process = fork_server().Process(target=save_and_exit, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    check_what_is_left(tmp_path, 1)


@pytest.mark.slow
def test_forty_kills(tmp_path):
    rounds = [
        (point, nth, async_save)
        for point in POINTS + [None] * 6
        for nth in (3, 4)
        for async_save in (False, True)
    ]
    kill_and_check(tmp_path / "checkpoints", rounds)


def _lose_a_peer(root, victim, point):
    commits = 0

    def die(name):
        nonlocal commits
        commits += name == POINTS[0]
        if dist.get_rank() == victim and name == point and commits == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    manager = CheckpointManager(Path(root), CheckpointConfig(), failpoint=die)
    for step in (1, 2, 3):
        save(manager, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "point"), [(0, point) for point in POINTS] + [(1, "after_shards")]
)
def test_one_of_two_ranks_is_killed(tmp_path, victim, point):
    with pytest.raises(AssertionError, match=r"died with exit code -9|Connection|failed"):
        run_distributed(_lose_a_peer, 2, str(tmp_path), victim, point, timeout=30)
    check_what_is_left(tmp_path, 1)
