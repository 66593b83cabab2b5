"""Products of experts in eight bits: what they are, in torch.

Rows become e4m3 numbers with a power of two for each 128 of them, as `wire` sends them; weights the
same with one for each 128 x 128. The product of each 128 summed numbers is added to sums in
float32: tensor cores keep fewer bits, so the kernels add there too (as DeepSeek-V3 does, arXiv
2412.19437, section 3.3.2). Scales are powers of two, so dividing by one and multiplying with it
round nothing, and it is the same to multiply what the numbers stand for. Shapes: R rows, E experts,
and M, N, K of a product.
"""

from typing import Literal

import torch
from torch import Tensor

from dmoe.ops.wire import BLOCK, block_exponents, dequantize_rows, quantize_rows

ExpertDtype = Literal["same", "fp8"]


def round_rows(x_RK: Tensor) -> Tensor:
    """Return what rows in eight bits stand for, in float32, or float64 where rows are that."""
    wide = torch.promote_types(x_RK.dtype, torch.float32)
    return dequantize_rows(quantize_rows(x_RK), x_RK.shape[1], wide)


def round_weights(w_EMN: Tensor) -> Tensor:
    """Return what weights in eight bits stand for, in float32, or float64 where they are that.

    Args:
        w_EMN: one matrix an expert; M and N are multiples of 128.
    """
    wide = torch.promote_types(w_EMN.dtype, torch.float32)
    blocks = w_EMN.float().unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    exponents = block_exponents(blocks.abs().amax((2, 4), keepdim=True))
    inverse, scale = (254 - exponents) << 23, exponents << 23
    numbers = (blocks * inverse.view(torch.float32)).to(torch.float8_e4m3fn)
    return (numbers.float() * scale.view(torch.float32)).view_as(w_EMN).to(wide)


def grouped_mm_fp8(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """Return (R, N) in the rows' dtype: each expert's rows times its matrix, both rounded.

    No gradient: the op that calls this knows which products of backward are rounded.

    Args:
        x_RK: rows, sorted by expert.
        w_ENK: one matrix an expert, cast to the rows' dtype first; a transposed view is fine.
        counts_E: int64 rows of each expert; they must sum to R.
    """
    y_RN = x_RK.new_empty(len(x_RK), w_ENK.shape[1])
    counts = counts_E.tolist()
    for x, w_NK, y in zip(x_RK.split(counts), w_ENK, y_RN.split(counts), strict=True):
        if len(x):
            a_blocks = round_rows(x).split(BLOCK, 1)
            w_blocks = round_weights(w_NK[None].to(x.dtype))[0].split(BLOCK, 1)
            total = a_blocks[0] @ w_blocks[0].t()
            for a_block, w_block in zip(a_blocks[1:], w_blocks[1:], strict=True):
                total += a_block @ w_block.t()
            y.copy_(total)
    return y_RN


def check_widths(dim: int, ffn_dim: int) -> None:
    """Check that blocks of 128 divide the widths.

    Raises:
        ValueError: they do not.
    """
    if dim % BLOCK or ffn_dim % BLOCK:
        raise ValueError(
            f"experts in fp8 need widths that are multiples of {BLOCK}, of which a block shares a "
            f"scale, but dim = {dim} and the width of an expert is {ffn_dim}: change these, or set "
            f"expert_dtype to same"
        )
