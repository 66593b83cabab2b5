"""Joining a job as torchrun starts one, and doing without."""

import socket

import pytest
import torch
import torch.distributed as dist

from dmoe.config import ConfigError
from dmoe.parallel import process_group


def test_a_lone_process_joins_nothing(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group() as device:
        assert not dist.is_initialized()
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_joins_what_torchrun_announces_and_leaves_at_the_end(monkeypatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    with process_group(timeout_seconds=30):
        assert dist.get_world_size() == 1
        # Who is in a group already, as a test's workers are, stays in it.
        with process_group():
            pass
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(
            ConfigError, match=r"2 processes on a machine with 1 GPUs.*--nproc-per-node 1"
        ),
        process_group(),
    ):
        pass
