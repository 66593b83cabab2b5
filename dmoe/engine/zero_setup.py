"""Brings DeepSpeed into this process: its accelerator, its logging, a process group.

DeepSpeed is imported here alone, and only where a run asks for it, since the import takes seconds.
"""

import atexit
import importlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import _get_build_directory

from dmoe.config.base import ConfigError
from dmoe.models.precision import Precision

_LONGEST_BUILD_S = 30 * 60


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed and let it use the process group of this job, or one of this process alone.

    None of its extensions is built, but for optimizer state on NVMe: what dmoe uses of it else is
    Python.

    Raises:
        ConfigError: it cannot be imported, or is told to use another device.
    """
    accelerator = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if accelerator != device.type:
        raise ConfigError(
            f"DS_ACCELERATOR is {accelerator!r} in the environment, but this run is on "
            f"{device.type!r}: unset it, or set CUDA_VISIBLE_DEVICES= to train on the CPU",
            key="engine.name",
        )
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            f"engine.name is 'deepspeed', which cannot be imported ({error}): install it with "
            f'pip install "deepspeed>=0.19.8,<0.20", or set engine.name=native',
            key="engine.name",
        ) from error
    _quieten(deepspeed)
    # It would build an all-reduce in shared memory, which its inference alone uses, for a minute
    # and a half; and a build that is killed leaves a lock for which every later run waits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def check_precision(precision: Precision) -> None:
    """Raise ConfigError where DeepSpeed refuses a precision on this device."""
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            "engine.precision is fp16, which engine.name = deepspeed takes only from devices with "
            "instructions for it, and this one has none: set it to bf16 or fp32, or set "
            "engine.name=native, which needs none",
            key="engine.precision",
        )


def load_async_io() -> None:
    """Build DeepSpeed's extension for NVMe, if that was not done before; ranks wait for the first.

    Raises:
        ConfigError: it cannot be built here, or a build that was killed has left its lock.
    """
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    key = "engine.deepspeed.zero_optimization.offload_optimizer.device"
    if not builder.is_compatible(verbose=False):
        raise ConfigError(
            f"{key} is nvme, but libaio is not installed here: apt install libaio-dev, or set it "
            f"to cpu",
            key=key,
        )
    # Extensions are built under a lock file, for which everyone waits without end.
    lock = Path(_get_build_directory(builder.name, verbose=False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > _LONGEST_BUILD_S:
        raise ConfigError(
            f"{key} is nvme, and {lock} is older than {_LONGEST_BUILD_S // 60} minutes, so the "
            f"build that made it was killed: delete it",
            key=key,
        )
    with redirect_stdout(sys.stderr):
        builder.load(verbose=False)


@contextmanager
def silent_start() -> Iterator[None]:
    """Drop what DeepSpeed prints of memory as it starts."""
    with redirect_stdout(io.StringIO()):
        yield


def _quieten(deepspeed: ModuleType) -> None:
    """Keep DeepSpeed's log off standard output, and what is expected out of it."""
    logger = deepspeed.utils.logger
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    logger.addFilter(_is_news)
    # It calls collectives by names that torch 2.13 has renamed.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is", FutureWarning)


def _is_news(record: logging.LogRecord) -> bool:
    """Our AdamW is torch's, scaled; and the trainer counts and tells skipped steps."""
    expected = ("untested optimizer", "OVERFLOW! Skipping step")
    return not any(text in record.getMessage() for text in expected)
