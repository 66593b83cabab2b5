"""Run a function on several gloo processes of this machine, as every multi-process test does."""

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call `fn(*args)` on `world_size` gloo ranks and return what each rank returned.

    Args:
        fn: a module-level function (it is sent to spawned processes by name).
        world_size: number of processes; the default process group spans them all.
        args: plain picklable arguments, the same for all ranks.
        timeout: seconds until the whole call is given up; a collective gives up a little sooner.

    Returns:
        The return values by rank; tensors come back as they were.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or naming those that hang.
    """
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    done = context.Event()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(
                target=_worker, args=(fn, rank, world_size, store, timeout, args, results, done)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, timeout)
        finally:
            done.set()
            for process in processes:
                process.join(timeout=5)
                process.kill()
                process.join()


def _collect(processes: list[Any], results: Any, timeout: float) -> list[Any]:
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(values) < len(processes):
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            _check_exit_codes(processes)
            waiting = [rank for rank in range(len(processes)) if rank not in values]
            assert time.monotonic() < deadline, f"ranks {waiting} did not finish in {timeout} s"
            continue
        if error is not None:
            # A rank that dies takes others with it: their connections close a moment earlier.
            time.sleep(0.2)
            _check_exit_codes(processes)
        assert error is None, f"rank {rank} failed:\n{error}"
        values[rank] = value
    return [values[rank] for rank in range(len(processes))]


def _check_exit_codes(processes: list[Any]) -> None:
    """A rank that ended well may still have its result in the pipe: only a bad exit is final."""
    for rank, process in enumerate(processes):
        code = process.exitcode
        assert code in (None, 0), f"rank {rank} died with exit code {code}"


def _worker(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    args: tuple[Any, ...],
    results: Any,
    done: Any,
) -> None:
    # Threads of the ranks would fight for the same few cores.
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=0.8 * timeout),
        )
        value = fn(*args)
        dist.barrier()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # A tensor in the queue lives in this process until the reader has taken it.
        done.wait(timeout)
