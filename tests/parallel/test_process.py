"""Joining a job as torchrun starts one, and doing without."""

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

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


_HUGE_KIB = """
import re
from pathlib import Path
import torch
from dmoe.parallel import process_group
with process_group():
    kept = torch.ones(2**24)
    print(re.search(r"AnonHugePages: *([0-9]+)", Path("/proc/self/smaps_rollup").read_text())[1])
"""


@pytest.mark.parametrize(
    ("of_user", "expected"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)]
)
def test_large_tensors_lie_in_huge_pages_unless_the_user_says_no(of_user, expected) -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[madvise]" not in modes.read_text():
        pytest.skip("this Linux has no huge pages on request")
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "THP_MEM_ALLOC_ENABLE")}
    out = subprocess.run(
        [sys.executable, "-c", _HUGE_KIB], env=outside | of_user, capture_output=True, text=True
    )
    assert (int(out.stdout) > 0) is expected, out.stderr


_FAULTS = """
import resource
import torch
from dmoe.parallel import process_group
def make():
    for _ in range(10):
        torch.ones(2**21)
with process_group():
    make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("of_user", "expected"),
    [({}, False), ({"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}, True)],
)
def test_freed_memory_is_used_again_unless_the_user_says_no(of_user, expected) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("this C library has no such settings")
    outside = {k: v for k, v in os.environ.items() if k != "RANK" and "MALLOC" not in k}
    env = outside | {"THP_MEM_ALLOC_ENABLE": "0"} | of_user
    out = subprocess.run([sys.executable, "-c", _FAULTS], env=env, capture_output=True, text=True)
    # Ten tensors of 8 MiB are 20,480 small pages.
    assert (int(out.stdout) > 10_000) is expected, out.stderr
