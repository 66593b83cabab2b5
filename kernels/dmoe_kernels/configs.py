"""Tile shapes: candidates for each kernel, pruned by shared memory, and what tuning found best.

`choose` reads a table on disk, and takes the first candidate that fits where that has none for the
size. So ranks that read the same table choose alike, and a graph may be captured at once. After
`tune_kernels` it measures all candidates at such a size instead, each rank for itself, and adds the
fastest to the table.
"""

import fcntl
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.testing import do_bench

from dmoe_kernels.common import INTERPRET, precision_of


class Config(NamedTuple):
    """Sizes of a tile, and how its program is compiled."""

    block_m: int
    """Rows, or the first dim of a weight gradient."""
    block_n: int
    """Columns; where an activation is gated, half of them of each of its two inputs."""
    block_k: int
    """Summed in a step, for elements of 2 bytes."""
    warps: int
    stages: int
    """Steps that are loaded ahead."""
    group_m: int = 16
    """Tiles of rows that share a block of weights in the L2 cache."""
    tma: bool = False
    """Load by TMA what lies in order (sm_90): the matrices, and rows that are not gathered."""
    gluon: bool = False
    """Take the form in Gluon (sm_90, Triton 3.6), with warps that load and warps that multiply."""


# The first of a kernel that fits is taken where nothing was tuned: on sm_90 what was best on an
# H100 at the sizes of Qwen3-30B-A3B. None spills: see aot.py.
CANDIDATES = {
    "up": [
        Config(128, 256, 64, 8, 3, 8, tma=True),
        Config(128, 256, 64, 8, 3, 16, tma=True),
        Config(128, 256, 64, 4, 4, 16, gluon=True),
        Config(128, 256, 64, 8, 3, 8),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 2),
        Config(64, 128, 64, 4, 4),
        Config(64, 64, 32, 4, 2),
    ],
    "gemm": [
        Config(128, 256, 64, 8, 3, 8, tma=True),
        Config(128, 256, 64, 8, 3, 16, tma=True),
        Config(128, 128, 64, 8, 4, 8, tma=True),
        Config(128, 256, 64, 4, 4, 16, gluon=True),
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 2),
        Config(128, 128, 32, 8, 3),
        Config(64, 128, 64, 4, 4),
        Config(64, 64, 32, 4, 2),
    ],
    "dz": [
        Config(128, 128, 64, 8, 4),
        Config(128, 64, 64, 8, 4),
        Config(128, 64, 64, 8, 3),
        Config(128, 64, 64, 8, 2),
        Config(64, 64, 64, 4, 3),
        Config(64, 64, 32, 4, 2),
    ],
    # The first block is that of the side whose rows lie in order.
    "outer": [
        Config(128, 256, 64, 4, 4, 8, gluon=True),
        Config(192, 256, 64, 4, 3, 8, gluon=True),
        Config(256, 128, 64, 8, 3, 4, tma=True),
        Config(256, 128, 64, 8, 3, 8, tma=True),
        Config(128, 256, 64, 8, 3, 8, tma=True),
        Config(256, 128, 64, 8, 4),
        Config(256, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 2),
        Config(128, 128, 32, 8, 3),
        Config(64, 64, 64, 4, 3),
        Config(64, 64, 32, 4, 2),
    ],
    # "outer" that adds to what is there, and so needs registers for it.
    "outer_add": [
        Config(128, 128, 64, 8, 4, 8, tma=True),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 8, 4),
        Config(128, 64, 32, 8, 3),
        Config(64, 64, 32, 4, 2),
    ],
    # In eight bits. Tiles have 256 columns, in one product after the other where the block has 128.
    "up_fp8": [
        Config(128, 128, 64, 8, 4, 8),
        Config(128, 128, 64, 8, 5, 8),
        Config(64, 256, 64, 8, 4, 8),
    ],
    # Where z is in float32.
    "up_fp8_wide": [Config(64, 256, 64, 8, 4, 8)],
    "gemm_fp8": [
        Config(128, 256, 64, 8, 4, 8),
        Config(128, 128, 64, 8, 5, 8),
        Config(64, 256, 64, 4, 2, 8),
    ],
}
ROWS_READ_PAST = 64
"""Rows after those of all experts that a weight gradient may read by TMA: `dz` zeroes them."""
assert all(
    c.block_k <= ROWS_READ_PAST for kernel in ("outer", "outer_add") for c in CANDIDATES[kernel]
)

# Rows in float32, whose products may be exact: without tensor cores, and all operands in registers.
# By whether products read both sides from shared memory, of widths that are even (see below).
_WIDE = {
    True: [
        Config(64, 64, 64, 8, 3),
        Config(64, 64, 64, 8, 2),
        Config(64, 64, 32, 4, 2),
    ],
    False: [
        Config(64, 32, 32, 4, 2),
        Config(32, 32, 64, 4, 2),
    ],
}
# Small, so that a small test has several tiles and a tail of each kind.
_INTERPRETED = Config(32, 16, 16, 4, 1, 2)


def bytes_needed(config: Config, itemsize: int) -> int:
    """Return the shared memory that the loads of a config take."""
    block_k = scaled_k(config, itemsize)
    return config.stages * (config.block_m + config.block_n) * block_k * itemsize


def scaled_k(config: Config, itemsize: int) -> int:
    """Return the block of the summed dim: half as long for elements of 4 bytes."""
    return max(16, config.block_k * 2 // itemsize)


def candidates(
    kernel: str,
    itemsize: int,
    shared_memory: int,
    *,
    wgmma: bool,
    tma: bool = True,
    gluon: bool = True,
    even: bool = True,
) -> list[Config]:
    """Return the configs of a kernel that fit.

    Args:
        kernel: a key of `CANDIDATES`.
        itemsize: bytes of an element.
        shared_memory: bytes a program may use.
        wgmma: whether products read both sides from shared memory, and TMA is there (sm_90):
            elsewhere a program that holds more than 2048 numbers a warp, 128 x 128 for 8 of them,
            spills.
        tma: whether TMA can read what it would have to.
        gluon: whether the form in Gluon can work on the tensors.
        even: whether blocks divide the summed dim, and 16 the other. If not, masks and addresses
            take registers, and as such widths are rare, the largest tiles are left out.
    """
    fitting = [
        config
        for config in (CANDIDATES[kernel] if itemsize < 4 else _WIDE[wgmma and even])
        if bytes_needed(config, itemsize) <= shared_memory
        and ((wgmma and even) or _held(kernel, config) <= 2048 * config.warps)
        and (not config.tma or (wgmma and tma))
        and (not config.gluon or (wgmma and gluon))
    ]
    assert fitting, f"no config of {kernel} fits {shared_memory} bytes"
    return fitting


def _held(kernel: str, config: Config) -> int:
    return config.block_m * config.block_n * (2 if kernel == "outer_add" else 1)


# Of the process, as backward passes run in threads of their own.
_report: Callable[[str], object] | None = None


def tune_kernels(report: Callable[[str], object] | None) -> None:
    """Measure from now on at each size that the table on disk does not have; None: no longer.

    Args:
        report: called with a line for each candidate that was measured.
    """
    global _report
    _report = report


def choose(
    kernel: str,
    form: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    run: Callable[[Config], object],
    *,
    tma: bool = False,
    gluon: bool = False,
    even: bool = True,
) -> Config:
    """Return the config for a kernel on a device.

    What was measured, or was in the table when the process first looked, stays for the process.

    Args:
        kernel: a key of `CANDIDATES`.
        form: what else tells one product of the kernel from another, such as its activation.
        dtype: of the rows.
        shape: the two widths of the product, E, and rows an expert, rounded up to a power of 2.
        device: where it runs.
        run: the product in a config, to be measured.
        tma: whether TMA can read what it would have to.
        gluon: whether the form in Gluon can work on the tensors.
        even: whether blocks divide the summed dim, and 16 the other.
    """
    if INTERPRET.value:
        return _INTERPRETED
    fitting = _candidates_of(kernel, dtype, device, tma=tma, gluon=gluon, even=even)
    numbers = f"{name_of(dtype)} {precision_of(dtype)}" if dtype.itemsize == 4 else name_of(dtype)
    chosen, key = tuned(device), _key(kernel, form, numbers, shape, tma, gluon)
    config = chosen.get(key)
    if config in fitting:  # a table may be older than the candidates
        return config
    report = _report
    if report is None or torch.cuda.is_current_stream_capturing():
        return fitting[0]
    best = _fastest(fitting, run, lambda text: report(f"{key}: {text}"))
    if best is None:
        return fitting[0]
    chosen[key] = best
    try:
        _keep(key, best, device)
    except OSError as error:
        report(f"{key}: not kept on disk: {error}")
    return best


def _fastest(
    fitting: tuple[Config, ...], run: Callable[[Config], object], report: Callable[[str], object]
) -> Config | None:
    """Return the fastest config, or None where memory is short; one that fails is passed over."""
    times, failure = {}, None
    for config in fitting:
        try:
            milliseconds = do_bench(
                functools.partial(run, config), warmup=5, rep=30, return_mode="median"
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            report("too little memory is free to measure here: the first config is taken")
            return None
        except (RuntimeError, triton.TritonError) as error:
            failure = error
            report(f"{config} failed: {error}".splitlines()[0])
        else:
            times[config] = milliseconds
            report(f"{milliseconds:.3f} ms, {config}")
    if not times:
        raise failure
    return min(times, key=times.__getitem__)


def _keep(key: str, config: Config, device: torch.device) -> None:
    """Add to the table on disk, in turns with other ranks that do."""
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(_read(path) | {key: config}, indent=1, sort_keys=True))
        whole.replace(path)


@functools.cache
def _key(
    kernel: str, form: str, numbers: str, shape: tuple[int, ...], tma: bool, gluon: bool
) -> str:
    words = [kernel, form, numbers, *map(str, shape)]
    return " ".join(words + ["tma"] * tma + ["gluon"] * gluon)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without that of its package."""
    return str(dtype).removeprefix("torch.")


def table_path(device: torch.device) -> Path:
    """Return where the tuned configs of a kind of device are kept, beside Triton's own cache."""
    name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
    return Path(triton.knobs.cache.dir) / f"dmoe_{name}_triton_{triton.__version__}.json"


def is_even(size_k: int, size_n: int) -> bool:
    """Say whether the blocks of all configs divide a summed dim, and 16 the other."""
    return size_k % 64 == 0 and size_n % 16 == 0


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """Return the rows an expert, rounded up to a power of 2, by which shapes are told apart."""
    return triton.next_power_of_2(max(1, triton.cdiv(num_rows, num_experts)))


@functools.cache
def _candidates_of(
    kernel: str, dtype: torch.dtype, device: torch.device, **suited: bool
) -> tuple[Config, ...]:
    shared_memory, wgmma = _limits(device)
    return tuple(candidates(kernel, dtype.itemsize, shared_memory, wgmma=wgmma, **suited))


@functools.cache
def _limits(device: torch.device) -> tuple[int, bool]:
    if torch.version.hip:
        return 64 * 1024, False
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.major == 9


@functools.cache
def tuned(device: torch.device) -> dict[str, Config]:
    """Return what this process takes: what the table on disk had, and what it measured itself."""
    table = _read(table_path(device))
    return {
        key: Config(*sizes) for key, sizes in table.items() if len(sizes) == len(Config._fields)
    }


def _read(path: Path) -> dict[str, list[int]]:
    """Return the table, or nothing where there is none that can be read."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
