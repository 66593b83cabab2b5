"""Brings DeepSpeed into this process: its accelerator, its logging, its extensions, a group.

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

from dmoe.config.base import ConfigError

# The longest of DeepSpeed's builds writes a file at least this often.
_STALE_AFTER_SECONDS = 600.0
_EXTENSIONS = ("deepspeed_shm_comm", "cpu_adam", "async_io")


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed and let it use the process group of this job, or one of this process alone.

    Raises:
        ConfigError: it is not installed, would use another device, or would wait for a dead build.
    """
    accelerator = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if accelerator != device.type:
        raise ConfigError(
            f"DS_ACCELERATOR is {accelerator!r} in the environment, but this run is on "
            f"{device.type!r}: unset it, or set CUDA_VISIBLE_DEVICES= to train on the CPU",
            key="engine.name",
        )
    check_build_locks(extension_root())
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            f"engine.name is 'deepspeed', which cannot be imported ({error}): install it with "
            f'pip install "deepspeed>=0.19,<0.20", or set engine.name=native',
            key="engine.name",
        ) from error
    _quieten(deepspeed)
    # An all-reduce in shared memory, for inference alone: building it takes a minute and a half.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def extension_root() -> Path:
    """Return the folder in which torch builds extensions."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("x", verbose=False)).parent


def check_build_locks(root: Path) -> None:
    """Refuse to wait for a build that was killed: torch would wait for its lock for ever.

    Raises:
        ConfigError: names the lock to remove.
    """
    for name in _EXTENSIONS:
        lock = root / name / "lock"
        if not lock.exists():
            continue
        idle = time.time() - max(file.stat().st_mtime for file in lock.parent.iterdir())
        if idle > _STALE_AFTER_SECONDS:
            raise ConfigError(
                f"{lock} is left from a build of DeepSpeed's {name} that was killed (nothing was "
                f"written there for {idle / 60:.0f} minutes), and every run would wait for it for "
                f"ever: remove that file",
                key="engine.name",
            )


@contextmanager
def silent_start() -> Iterator[None]:
    """Drop what DeepSpeed prints of memory and groups as it starts."""
    with redirect_stdout(io.StringIO()):
        yield


def _quieten(deepspeed: ModuleType) -> None:
    """Keep what DeepSpeed tells off standard output, and what is meant to be out of it."""
    logger = deepspeed.utils.logger
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    # Our AdamW is torch's, scaled; and skipped steps are counted and told by the trainer.
    for expected in ("untested optimizer", "OVERFLOW! Skipping step"):
        logger.addFilter(lambda record, text=expected: text not in record.getMessage())
    # It calls collectives by names that torch 2.13 has renamed.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is", FutureWarning)
