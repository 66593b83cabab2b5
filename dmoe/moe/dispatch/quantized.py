"""Rows sent in eight bits: quantised on the way to the experts, nowhere else.

What experts return, and all gradients, are sent as they are; the gradient passes the rounding as if
there were none. DeepSeek-V3 sends combined rows as they are too, and quantises besides the gradient
that goes to the experts (arXiv 2412.19437, section 3.3.3). Shapes: T tokens, N received rows, D
model dim.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dmoe.ops import RowMap
from dmoe.ops.rows import sum_rows
from dmoe.ops.wire import dequantize_rows, quantize_rows
from dmoe.parallel import all_to_all_rows


def send_quantized(
    x_TD: Tensor,
    sent: RowMap,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup,
    *,
    by_triton: bool,
) -> Tensor:
    """Do `all_to_all_rows(gather(x_TD, sent), ...)` with rows in eight bits."""
    return _SendQuantized.apply(x_TD, sent, send_counts, receive_counts, group, by_triton)


def round_rows(x_TD: Tensor, *, by_triton: bool) -> Tensor:
    """Return what `send_quantized` would bring, where nothing is sent."""
    return _RoundRows.apply(x_TD, by_triton)


class _SendQuantized(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        sent: RowMap,
        send_counts: list[int],
        receive_counts: list[int],
        group: dist.ProcessGroup,
        by_triton: bool,
    ) -> Tensor:
        ctx.sent, ctx.by_triton = sent, by_triton
        ctx.route = (receive_counts, send_counts, group)
        wire = quantize_rows(x_TD, sent, by_triton=by_triton)
        received = all_to_all_rows(wire, send_counts, receive_counts, group)
        return dequantize_rows(received, x_TD.shape[1], x_TD.dtype, by_triton=by_triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor | None, ...]:
        dx_RD = all_to_all_rows(dx_ND, *ctx.route)
        dx_TD = sum_rows(dx_RD, ctx.sent, by_triton=ctx.by_triton)
        return dx_TD, None, None, None, None, None


class _RoundRows(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, by_triton: bool) -> Tensor:
        wire = quantize_rows(x_TD, by_triton=by_triton)
        return dequantize_rows(wire, x_TD.shape[1], x_TD.dtype, by_triton=by_triton)

    @staticmethod
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None]:
        return dx_TD, None
