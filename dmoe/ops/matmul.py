"""Products of two matrices: in float32 by oneDNN, where MKL, which torch takes, is slow.

MKL keeps its fastest code to Intel's processors: on an AMD EPYC with AVX-512 oneDNN takes half the
time (docs/results/cpu_amd_epyc.md). torch has no switch for that, but an op, made for its compiler,
that reads factors in either memory order. Narrow numbers torch multiplies by oneDNN anyway.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def by_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether products go through oneDNN here that torch would leave to MKL."""
    here = _ONEDNN_IS_FASTER and device.type == "cpu" and dtype == torch.float32
    return here and not torch.compiler.is_compiling()


def mm(a_MK: Tensor, b_KN: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return (M, N): a b. No gradient, as for all here."""
    if not by_onednn(a_MK.device, a_MK.dtype):
        return torch.mm(a_MK, b_KN, out=out)
    y_MN = linear_forward(a_MK, b_KN.t())
    return y_MN if out is None else out.copy_(y_MN)


def outer(a_RM: Tensor, b_RN: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return (M, N): a^T b."""
    # oneDNN's op copies a transposed first factor, so that is the narrower one.
    if a_RM.shape[1] > b_RN.shape[1] and by_onednn(a_RM.device, a_RM.dtype):
        y_MN = mm(b_RN.t(), a_RM).t()
        return y_MN if out is None else out.copy_(y_MN)
    return mm(a_RM.t(), b_RN, out=out)


def linear_forward(x: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return (..., N): x w^T + bias, for (..., K) `x`."""
    empty = not (x.numel() and w_NK.numel())
    if empty or not by_onednn(x.device, x.dtype):
        return F.linear(x, w_NK, bias_N)
    if not (w_NK.is_contiguous() or w_NK.t().is_contiguous()):
        w_NK = w_NK.contiguous()  # with gaps between rows oneDNN would take its reference code
    return torch.ops.mkldnn._linear_pointwise(x, w_NK, bias_N, "none", [], "")


def _onednn_is_faster() -> bool:
    """Say whether torch multiplies by MKL, has oneDNN, and is on AMD's processor with AVX-512."""
    processors = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and processors.exists()
        and "AuthenticAMD" in processors.read_text()
    )


_ONEDNN_IS_FASTER = _onednn_is_faster()
