"""What the Gluon kernels for sm_90 share: the language, if this Triton has it, and their rings.

A ring is stages of shared memory, each with a barrier that says it is filled and one that says it
is free again. Who waits counts stages round the ring, and flips the phase after the last one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    jit = gluon.jit
except ImportError:  # a Triton without Gluon; `check_suited` then says so
    gluon = gl = None

    def jit(function: Any = None, **_: Any) -> Any:
        """Leave kernels as they are; nothing can call them."""
        return function or jit


HAS_GLUON = gluon is not None and hasattr(gl.shared_memory_descriptor, "_reinterpret")
"""Whether this Triton has the Gluon that the kernels are written in, which is that of 3.6."""


def check_suited(*tensors: Tensor) -> None:
    """Raise RuntimeError where the kernels cannot read these: device, dtype or place."""
    first = tensors[0]
    if not HAS_GLUON:
        raise RuntimeError(f"Triton {triton.__version__} has no Gluon of the kind of 3.6")
    nvidia = first.device.type == "cuda" and not torch.version.hip
    if not nvidia or torch.cuda.get_device_capability(first.device)[0] != 9:
        raise RuntimeError("this kernel is for sm_90 alone")
    dtypes = [t.dtype for t in tensors]
    if first.dtype not in (torch.bfloat16, torch.float16) or any(d != first.dtype for d in dtypes):
        raise RuntimeError(f"this kernel multiplies bfloat16 or float16, not {dtypes}")
    if not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors):
        raise RuntimeError("rows and weights must be contiguous and begin at 16 bytes")


def register_split(multiply: int, load_warps: int, load_registers: int) -> int:
    """Return the registers of a thread that multiplies: those that loading warps leave.

    Args:
        multiply: warpgroups that multiply.
        load_warps: warps that load.
        load_registers: of a thread that loads.
    """
    warpgroups = multiply + (load_warps + 3) // 4
    registers = 65536 // (128 * warpgroups) // 8 * 8 * warpgroups
    registers -= load_registers * (warpgroups - multiply)
    return registers // multiply // 8 * 8


@jit
def next_stage(stage, phase, STAGES: tl.constexpr):
    """Return the stage after this one, and its phase."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@jit
def stage_before(stage, STAGES: tl.constexpr):
    """Return the stage before this one."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)
