"""The feed-forward network of all experts at once, over rows sorted by expert.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else F.
The gate weight of a row multiplies the hidden activation, not the output: the product is the same,
and the gradient of the gate, <dy W_down, a>, then needs no output row to be saved.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops.activation import Activation, activate_weighted, activate_weighted_backward
from dmoe.ops.backend import Backend, ResolvedBackend, resolve_backend
from dmoe.ops.fp8 import ExpertDtype, check_widths, grouped_mm_fp8
from dmoe.ops.grouped_mm import grouped_mm, grouped_outer
from dmoe.ops.rows import RowMap, gather_loop, gather_sum_loop, sum_rows, take_rows
from dmoe.ops.triton_experts import backward_by_triton, forward_by_triton


def expert_ffn(
    x_ND: Tensor,
    rows: RowMap,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    *,
    activation: Activation,
    backend: Backend = "auto",
    recompute: bool = False,
    dtype: ExpertDtype = "same",
    main_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return y_ND: for each source the sum over its rows of weights_R * W_down act(W_up x).

    Rows are read and summed through `rows`, forward and backward: only `x_ND` and the
    pre-activation (R, 2F or F) are saved, so a layer of K slots keeps 2ND + 4NKF bytes in bfloat16
    (gated), and 2ND with `recompute`.

    Args:
        x_ND: (N, D) source rows.
        rows: the map from routed rows to sources; rows are sorted by expert.
        weights_R: (R,) gate weights, float32 or wider.
        counts_E: (E,) int64 rows of each expert.
        w_up: (E, 2F, D) gate rows, then up rows, for "swiglu"; else (E, F, D). Products are in
            `x_ND`'s dtype; weights, and so their gradients, may be wider.
        w_down_EDF: (E, D, F), as `w_up`.
        activation: "swiglu", or "gelu" (tanh form, as in GPT-2) or "relu" without a gate.
        backend: "triton" for the kernels, "torch" for `torch.nn.functional.grouped_mm`, "loop" for
            an expert after the other, "megablocks" for its grouped GEMM.
        recompute: compute the pre-activation again in backward, and do not save it.
        dtype: "fp8" for products in eight bits, forward and of the gradient of `x_ND`, as `fp8`
            defines them; gradients pass the rounding as if there were none. "triton" is fast, the
            others are slow.
        main_grads: what backward adds the gradients of `w_up` and `w_down_EDF` to, such as float32
            sums over micro-batches; the weights themselves then get none. Contiguous.

    Returns:
        (N, D) in `x_ND`'s dtype; zero for a source without rows.

    Raises:
        ValueError: widths do not suit eight bits, or `main_grads` not the weights.
    """
    if main_grads is not None:
        for main, w in zip(main_grads, (w_up, w_down_EDF), strict=True):
            if main.shape != w.shape or not main.is_contiguous():
                raise ValueError(
                    f"main_grads must be contiguous, with the shapes of the weights: one is "
                    f"{tuple(main.shape)} with strides {main.stride()}, its weight "
                    f"{tuple(w.shape)}"
                )
    if dtype == "fp8":
        check_widths(*w_down_EDF.shape[1:])
    options = _Options(activation, backend, recompute, dtype, main_grads)
    return _ExpertFFN.apply(x_ND, weights_R, w_up, w_down_EDF, rows, counts_E, options)


def expert_ffn_loop(
    x_ND: Tensor,
    rows: RowMap,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    *,
    activation: Activation,
    factors_RF: Tensor | None = None,
) -> Tensor:
    """Define `expert_ffn`: the same arguments, an expert at a time, autograd for the gradients.

    `factors_RF` multiplies the activations (expert dropout), which the fast paths cannot.
    """
    x_RD = gather_loop(x_ND, rows)
    counts = counts_E.tolist()
    factors = [1.0] * len(counts) if factors_RF is None else factors_RF.to(x_ND).split(counts)
    outputs = []
    for expert, x in enumerate(x_RD.split(counts)):
        hidden = F.linear(x, w_up[expert].to(x.dtype))
        if activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        elif activation == "gelu":
            hidden = F.gelu(hidden, approximate="tanh")
        else:
            hidden = F.relu(hidden)
        hidden = hidden * factors[expert]
        outputs.append(F.linear(hidden, w_down_EDF[expert].to(x.dtype)))
    return gather_sum_loop((torch.cat(outputs) * weights_R[:, None]).to(x_ND.dtype), rows)


class _Options(NamedTuple):
    activation: Activation
    backend: Backend
    recompute: bool
    dtype: ExpertDtype
    main_grads: tuple[Tensor, Tensor] | None


def _product(
    dtype: ExpertDtype, backend: ResolvedBackend
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the product of rows (R, K) with matrices (E, N, K), given the counts."""
    if dtype == "fp8":
        return grouped_mm_fp8

    def multiply(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
        return grouped_mm(x_RK, w_ENK.transpose(1, 2), counts_E, backend)

    return multiply


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_R: Tensor,
        w_up: Tensor,
        w_down_EDF: Tensor,
        rows: RowMap,
        counts_E: Tensor,
        options: _Options,
    ) -> Tensor:
        backend = resolve_backend(
            options.backend,
            x_ND.device,
            x_ND.dtype,
            options.dtype,
            rows_an_expert=len(weights_R) / len(counts_E),
        )
        ctx.backend, ctx.options, activation = backend, options, options.activation
        if backend == "triton":
            z_RH, y_ND = forward_by_triton(
                x_ND,
                rows,
                weights_R,
                counts_E,
                w_up,
                w_down_EDF,
                activation,
                fp8=options.dtype == "fp8",
            )
        else:
            multiply = _product(options.dtype, backend)
            z_RH = multiply(take_rows(x_ND, rows), w_up, counts_E)
            a_RF = activate_weighted(z_RH, weights_R, activation)
            y_ND = sum_rows(multiply(a_RF, w_down_EDF, counts_E), rows)
        kept_RH = None if options.recompute else z_RH
        ctx.save_for_backward(x_ND, weights_R, w_up, w_down_EDF, kept_RH, counts_E, *rows)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_R, w_up, w_down_EDF, z_RH, counts_E, *row_tensors = ctx.saved_tensors
        rows, (activation, _, _, dtype, main_grads) = RowMap(*row_tensors), ctx.options
        # The gradient of a sum is expanded: every row of it the same memory.
        dy_ND = dy_ND.contiguous()
        trained = main_grads is not None or any(ctx.needs_input_grad[2:4])
        dw: list[Tensor | None]
        if ctx.backend == "triton":
            dx_ND, dweights_R, *dw = backward_by_triton(
                dy_ND,
                x_ND,
                rows,
                weights_R,
                counts_E,
                w_up,
                w_down_EDF,
                z_RH,
                activation,
                main_grads,
                fp8=dtype == "fp8",
                trained=trained,
            )
        else:
            dy_RD, backend = take_rows(dy_ND, rows), ctx.backend
            multiply = _product(dtype, backend)
            if z_RH is None:
                z_RH = multiply(take_rows(x_ND, rows), w_up, counts_E)
            da_RF = grouped_mm(dy_RD, w_down_EDF, counts_E, backend)
            a_RF, dz_RH, dweights_R = activate_weighted_backward(z_RH, da_RF, weights_R, activation)
            dw = [None, None]
            if trained:
                dw_down_EDF = grouped_outer(dy_RD, a_RF, counts_E, backend)
                del dy_RD
                dw_up = grouped_outer(dz_RH, take_rows(x_ND, rows), counts_E, backend)
                dw = [dw_up.to(w_up.dtype), dw_down_EDF.to(w_down_EDF.dtype)]
            dx_ND = sum_rows(multiply(dz_RH, w_up.transpose(1, 2), counts_E), rows)
        if main_grads is None:
            return dx_ND, dweights_R, *dw, None, None, None
        if ctx.backend != "triton":  # the kernels have added them
            for main, gradient in zip(main_grads, dw, strict=True):
                main.add_(gradient)
        return dx_ND, dweights_R, None, None, None, None, None
