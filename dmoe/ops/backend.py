"""What the experts of a layer run on, and whether it is there."""

import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from dmoe.config.base import ConfigError
from dmoe.ops.fp8 import ExpertDtype
from dmoe.ops.matmul import by_onednn

Backend = Literal["auto", "triton", "torch", "loop", "megablocks"]
ResolvedBackend = Literal["triton", "torch", "loop", "megablocks"]

# Dtypes that grouped GEMMs take; float64, which proofs use, is a loop on every backend.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows an expert from which the loop was faster than torch's grouped GEMM in float32; with half as
# many it was as fast, with fewer slower, as in generation.
_MANY_ROWS = 64

# The only release with which the kernels ran on a GPU.
_TIMED_TRITON = (3, 6)


def resolve_backend(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    experts: ExpertDtype = "same",
    rows_an_expert: float = math.inf,
) -> ResolvedBackend:
    """Return the backend that is used on a device, for so many rows an expert on average.

    "auto" is "triton" where its kernels have been timed and were faster: with Triton 3.6 on GPUs of
    compute capability 9, in bfloat16 1.7 to 3.4 times as fast (docs/results/kernels_h200.md);
    float16 is taken to be like it. On a CPU torch's grouped GEMM compiles each product of narrow
    dtypes anew, as no two have as many rows: there "auto" is "loop", which keeps to few shapes; it
    is in float32, too, where oneDNN is faster than MKL and experts have rows enough for it.
    Elsewhere it is "torch". Rows in float64 are always worked by "loop".

    Raises:
        ConfigError: the backend is not installed, or cannot run here.
    """
    if backend == "triton":
        _check_triton(device)
        if experts == "fp8":
            _check_fp8(device)
    if backend == "megablocks":
        _check_megablocks(device, dtype)
    if dtype not in _GROUPED_DTYPES:
        return "loop"
    if backend != "auto":
        return backend
    narrow = dtype.itemsize < 4
    many = by_onednn(device, dtype) and rows_an_expert >= _MANY_ROWS
    if many or (narrow and device.type == "cpu"):
        return "loop"
    return "triton" if narrow and _is_timed(device) else "torch"


def uses_kernels(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether Triton kernels work around the experts too: to route, sort and send their rows.

    `dtype` is that of the rows, also where what works on them is in float32.
    """
    return backend != "megablocks" and resolve_backend(backend, device, dtype) == "triton"


def tune_kernels(report: Callable[[str], object] | None) -> None:
    """Let the kernels measure tile shapes at sizes that are new, and report each; None: no longer.

    The fastest are kept on disk for all later processes, whether these measure or not. Triton must
    be installed.
    """
    from dmoe_kernels import configs

    configs.tune_kernels(report)


def _is_timed(device: torch.device) -> bool:
    """Say whether the kernels can run and were faster than torch on such a device."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return major == 9 and _is_installed("triton", "dmoe_kernels") and _triton() == _TIMED_TRITON


@functools.cache
def _triton() -> tuple[int, ...]:
    """Return the release of Triton without importing it, or nothing where it has another name."""
    try:
        numbers = re.match(r"(\d+)\.(\d+)", version("triton"))
    except PackageNotFoundError:
        numbers = None
    return tuple(map(int, numbers.groups())) if numbers else ()


@functools.cache
def _is_installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) for name in packages)


def _check_triton(device: torch.device) -> None:
    if not _is_installed("triton", "dmoe_kernels"):
        raise ConfigError(
            "model.moe.backend = triton, but Triton is not installed here: pip install triton, or "
            "set model.moe.backend to auto",
            key="model.moe.backend",
        )
    # Tests run the kernels in Triton's interpreter.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"model.moe.backend = triton needs an NVIDIA or AMD GPU, this device is {device}: set "
            f"model.moe.backend to auto",
            key="model.moe.backend",
        )
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ConfigError(
                f"model.moe.backend = triton needs compute capability 8.0 or later (A100), this "
                f"GPU, {torch.cuda.get_device_name(device)}, has {major}.{minor}: set "
                f"model.moe.backend to torch",
                key="model.moe.backend",
            )


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda":  # the interpreter
        return
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        kind = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"model.moe.expert_dtype = fp8 with model.moe.backend = triton needs the tensor cores "
            f"of compute capability 9 (H100, H200), this device is {kind}: set "
            f"model.moe.expert_dtype to same, or model.moe.backend to torch, which computes the "
            f"same slowly",
            key="model.moe.expert_dtype",
        )


def _check_megablocks(device: torch.device, dtype: torch.dtype) -> None:
    if not _is_installed("megablocks", "grouped_gemm"):
        raise ConfigError(
            "model.moe.backend = megablocks, but it is not installed here. On a machine with a GPU "
            "and the CUDA toolkit: pip install 'dmoe[megablocks]'; or set model.moe.backend to "
            "auto",
            key="model.moe.backend",
        )
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float64):
        raise ConfigError(
            f"model.moe.backend = megablocks multiplies bfloat16 on an NVIDIA GPU, this is {dtype} "
            f"on {device}: set engine.precision to bf16, or model.moe.backend to auto",
            key="model.moe.backend",
        )
