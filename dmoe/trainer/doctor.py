"""Looks over the machine before a run: versions, devices, communication, disk, limits.

Called by `dmoe doctor`. Nothing here raises: a check that cannot be made is one that failed.
"""

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.table import Table

from dmoe.ops import resolve_backend
from dmoe.testing import run_distributed

Status = Literal["ok", "warn", "fail"]

_MB = 10**6
_MIN_PYTHON = (3, 11)
_DISK_SAMPLE = 64 * _MB
_SLOW_DISK = 50 * _MB
_LITTLE_SPACE = 10_000 * _MB
_FEW_FILES = 4096
_PING_ROUNDS = 20
_PING_SECONDS = 60.0
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """What one look found."""

    name: str
    status: Status
    """"warn" may hinder a run, "fail" will."""
    detail: str
    """What was seen and, where it is not good, what to do."""


def doctor(disk_path: Path) -> list[Check]:
    """Check this machine.

    Args:
        disk_path: the folder where runs will be kept; it need not exist yet.
    """
    looks: dict[str, Callable[[], Check]] = {
        "python": _python,
        "torch": _torch,
        "dmoe": lambda: _package("dmoe"),
        "triton": lambda: _package("triton"),
        "deepspeed": lambda: _package("deepspeed"),
        "devices": _devices,
        "experts": _experts,
        "communication": _communication,
        "disk speed": lambda: _disk_speed(disk_path),
        "disk space": lambda: _disk_space(disk_path),
        "compiler": _compiler,
        "open files": _open_files,
    }
    return [_look(name, look) for name, look in looks.items()]


def render(checks: list[Check]) -> Table:
    """Return a table for a terminal."""
    table = Table("check", "status", "detail")
    for check in checks:
        color = _COLORS[check.status]
        table.add_row(check.name, f"[{color}]{check.status}[/]", check.detail)
    return table


def _look(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:
        # The last line says what went wrong; an error from another process is a whole traceback.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Check(name, "fail", f"could not be checked: {reason}")


def _python() -> Check:
    version = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < _MIN_PYTHON:
        return Check("python", "fail", f"{version}; install Python 3.11 or newer")
    return Check("python", "ok", version)


def _torch() -> Check:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        detail = f"{torch.__version__} lacks grouped_mm; install torch 2.11 or newer"
        return Check("torch", "fail", detail)
    return Check("torch", "ok", torch.__version__)


def _package(name: str) -> Check:
    """Report a package that a run can do without."""
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "ok", "not installed")


def _devices() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [f"CPU with {cores} cores, {_giga(memory)}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name}, {_giga(properties.total_memory)}")
    return Check("devices", "ok", "; ".join(found))


def _experts() -> Check:
    """Report what experts run on in bfloat16, and where Triton keeps them off the kernels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    taken = resolve_backend("auto", device, torch.bfloat16)
    detail = f"model.moe.backend=auto takes {taken} in bfloat16"
    is_sm_90 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if is_sm_90 and not torch.version.hip and taken != "triton":
        detail += "; with Triton 3.6 it takes the kernels, which are faster on this GPU"
        return Check("experts", "warn", detail)
    return Check("experts", "ok", detail)


def _communication() -> Check:
    """Time all-reduces between two processes: over NCCL with two GPUs, over gloo otherwise."""
    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    try:
        (latency, bandwidth), _ = run_distributed(_ping, 2, backend, timeout=_PING_SECONDS)
    except AssertionError as error:
        # This is how `run_distributed` tells that a rank failed.
        remedy = {
            "gloo": "see that this host's name resolves, or set GLOO_SOCKET_IFNAME=lo",
            "nccl": "run again with NCCL_DEBUG=INFO to see which transport fails",
        }[backend]
        reason = str(error).strip().splitlines()[-1]
        return Check("communication", "fail", f"{backend} between 2 processes: {reason}; {remedy}")
    detail = (
        f"{backend}, 2 processes: {latency * 1e6:.0f} us for 8 bytes, {bandwidth / _MB:.0f} MB/s"
    )
    return Check("communication", "ok", f"{detail} for 16 MB")


def _ping(backend: str) -> tuple[float, float]:
    """Return the seconds of a small all-reduce and the bytes a second of one of 16 MB."""
    group, device = None, torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", dist.get_rank())
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")

    def seconds(numbers: int) -> float:
        tensor = torch.zeros(numbers, device=device)
        times = []
        for _ in range(_PING_ROUNDS):
            dist.barrier(group=group)
            start = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            # Reading a value waits for the device.
            tensor[0].item()
            times.append(time.perf_counter() - start)
        return sorted(times)[_PING_ROUNDS // 2]

    size = 16 * _MB
    return seconds(2), size / seconds(size // 4)


def _disk_speed(path: Path) -> Check:
    folder = _existing(path)
    block = os.urandom(_MB)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            for _ in range(_DISK_SAMPLE // _MB):
                file.write(block)
            os.fsync(file.fileno())
            write_speed = _DISK_SAMPLE / (time.perf_counter() - start)
            if hasattr(os, "posix_fadvise"):
                # Otherwise what was just written would be read from memory.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(_MB):
                pass
            read_speed = _DISK_SAMPLE / (time.perf_counter() - start)
    except OSError as error:
        detail = f"cannot write in {folder}: {error.strerror}; change its rights, or run.dir"
        return Check("disk speed", "fail", detail)
    detail = f"{folder}: write {write_speed / _MB:.0f} MB/s, read {read_speed / _MB:.0f} MB/s"
    if write_speed < _SLOW_DISK:
        detail += "; checkpoints will be slow: put run.dir on a faster disk"
        return Check("disk speed", "warn", detail)
    return Check("disk speed", "ok", detail)


def _disk_space(path: Path) -> Check:
    folder = _existing(path)
    free = shutil.disk_usage(folder).free
    detail = f"{folder}: {_giga(free)} free"
    if free < _LITTLE_SPACE:
        detail += "; a checkpoint takes 12 bytes a parameter: make room, or change run.dir"
        return Check("disk space", "warn", detail)
    return Check("disk space", "ok", detail)


def _existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _compiler() -> Check:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return Check("compiler", "ok", found)
    detail = f"no C++ compiler ({', '.join(names)}); install one, or keep engine.compile off"
    return Check("compiler", "warn", detail)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        allowed = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        detail = f"at most {soft}; for many data shards or ranks raise it: ulimit -n {allowed}"
        return Check("open files", "warn", detail)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}"
    return Check("open files", "ok", shown)


def _giga(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
