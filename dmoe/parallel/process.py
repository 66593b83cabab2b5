"""Start and end of this process's part in the job; one process without torchrun needs no group."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dmoe.config.base import ConfigError

# The environment variable that means the same, and the number and value for glibc's mallopt: up to
# 32 MiB, the most that it allows, come from the heap, of which nothing is given back.
_MALLOC_OPTIONS = (
    ("MALLOC_MMAP_THRESHOLD_", -3, 32 * 2**20),
    ("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1),
)


def is_first_process() -> bool:
    """Say whether this process is the one of its job that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def tune_host_memory() -> None:
    """Take large host tensors from huge pages, and keep what is freed for those that come next.

    A step makes the same large tensors again and again. Fresh memory is cleared by the kernel,
    which took longer than many an operation on it, and with 4 KiB pages most of the time for the
    gradients of many experts. What the user has decided by environment variables stays. Takes
    effect before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for variable, parameter, value in _MALLOC_OPTIONS:
            if variable not in os.environ:
                libc.mallopt(parameter, value)


@contextmanager
def process_group(timeout_seconds: float = 600.0) -> Iterator[torch.device]:
    """Join the job that torchrun started, if any, and yield this rank's device.

    GPUs talk through NCCL; CPUs, and the host tensors of a GPU job (checkpoints), through gloo.

    Args:
        timeout_seconds: how long a collective waits for the other ranks before it fails.

    Raises:
        ConfigError: more processes than GPUs.
    """
    tune_host_memory()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        num_local, num_devices = (
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            torch.cuda.device_count(),
        )
        if num_local > num_devices:
            raise ConfigError(
                f"{num_local} processes on a machine with {num_devices} GPUs: start as many as "
                f"there are GPUs (torchrun --nproc-per-node {num_devices}), or set "
                f"CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # torchrun sets these; a lone process has no one to meet.
    joined = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if joined:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield device
    finally:
        if joined:
            dist.destroy_process_group()
