"""The experts' feed-forward network, forward and backward: two grouped GEMMs with fused epilogues.

The up kernel reads x through the index, and its epilogue stores Z, the pre-activation, and
A = s act(Z) with the gate s; the down GEMM and a sum over each source's rows follow. Backward, one
epilogue makes dZ, A again and the gate's gradient <dY W_down, act(Z)>, so that Z alone is kept
beside x. Shapes: N sources, R routed rows, E experts, D model dim, F expert
dim, H = 2F if gated, else F.
"""

import torch
from torch import Tensor

from dmoe_kernels import fp8_gemm, fp8_up
from dmoe_kernels.combine import gather_sum
from dmoe_kernels.dz import dz
from dmoe_kernels.fp8 import quantize_rows, quantize_weights
from dmoe_kernels.grouped_gemm import grouped_gemm, grouped_outer
from dmoe_kernels.tiles import tile_rows
from dmoe_kernels.up import up

BLOCK_M = 128
"""Rows of a tile in most configs: those share one table of tiles."""


def experts_forward(
    x_ND: Tensor,
    row_map: tuple[Tensor, Tensor, Tensor],
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    *,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y_ND, each source's rows of s W_down act(W_up x) summed, and z_RH for backward.

    Args:
        x_ND: source rows.
        row_map: index_R, by_source_R, offsets_N1 of `dmoe.ops.RowMap`; R may exceed the sum of the
            counts if the rows past it belong to no source.
        weights_R: gates, float32.
        counts_E: (E,) int64.
        w_up_EHD: in x's dtype; gate rows, then up rows, for "swiglu".
        w_down_EDF: in x's dtype.
        activation: "swiglu", "gelu" (tanh form) or "relu".
        fp8: multiply in eight bits.
    """
    index_R, by_source_R, offsets_N1 = row_map
    num_rows = len(index_R)
    tiles = tile_rows(counts_E, num_rows, BLOCK_M)
    if fp8:
        z_RH, quantized_RF = fp8_up.up(
            x_ND, index_R, weights_R, counts_E, w_up_EHD, activation, tiles=tiles
        )
        down = quantize_weights(w_down_EDF)
        y_RD = fp8_gemm.grouped_gemm(quantized_RF, down, counts_E, dtype=x_ND.dtype, tiles=tiles)
    else:
        z_RH, a_RF = up(x_ND, index_R, weights_R, counts_E, w_up_EHD, activation, tiles=tiles)
        y_RD = grouped_gemm(
            a_RF, w_down_EDF, counts_E, transposed=True, num_rows=num_rows, tiles=tiles
        )
    return gather_sum(y_RD, by_source_R, offsets_N1), z_RH


def experts_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    z_RH: Tensor | None,
    row_map: tuple[Tensor, Tensor, Tensor],
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    weight_dtype: torch.dtype,
    *,
    accumulate: tuple[Tensor, Tensor] | None = None,
    fp8: bool = False,
    trained: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dx_ND, dweights_R, dw_up_EHD and dw_down_EDF.

    Args:
        dy_ND: gradient of the output, contiguous.
        x_ND: as in the forward pass, as are the others not named here.
        z_RH: what the forward pass returned, or None to compute it again.
        row_map: as in the forward pass.
        weights_R: as in the forward pass.
        counts_E: as in the forward pass.
        w_up_EHD: as in the forward pass.
        w_down_EDF: as in the forward pass.
        activation: as in the forward pass.
        weight_dtype: of the gradients of the weights.
        accumulate: gradients of w_up and w_down to add to, or None for new ones.
        fp8: as in the forward pass; of the gradients, dx is multiplied so.
        trained: whether to compute the gradients of the weights; else they are None.
    """
    index_R, by_source_R, offsets_N1 = row_map
    num_rows = len(index_R)
    tiles = tile_rows(counts_E, num_rows, BLOCK_M)
    if z_RH is None:
        first = fp8_up.up if fp8 else up
        z_RH, _ = first(x_ND, index_R, weights_R, counts_E, w_up_EHD, activation, tiles=tiles)
    dz_RH, a_RF, dweights_R = dz(
        dy_ND, index_R, z_RH, weights_R, counts_E, w_down_EDF, activation, tiles=tiles
    )
    into_up, into_down = accumulate or (None, None)
    dw_up_EHD = dw_down_EDF = None
    if trained:
        dw_down_EDF = grouped_outer(
            dy_ND, a_RF, index_R, tiles.offsets, gather_a=True, dtype=weight_dtype, out=into_down
        )
    if fp8:
        turned = quantize_weights(w_up_EHD, transposed=True)
        rows = quantize_rows(dz_RH)
        dx_RD = fp8_gemm.grouped_gemm(rows, turned, counts_E, dtype=dz_RH.dtype, tiles=tiles)
    else:
        dx_RD = grouped_gemm(
            dz_RH, w_up_EHD, counts_E, transposed=False, num_rows=num_rows, tiles=tiles
        )
    dx_ND = gather_sum(dx_RD, by_source_R, offsets_N1)
    if trained:
        dw_up_EHD = grouped_outer(
            dz_RH, x_ND, index_R, tiles.offsets, gather_a=False, dtype=weight_dtype, out=into_up
        )
    return dx_ND, dweights_R, dw_up_EHD, dw_down_EDF
