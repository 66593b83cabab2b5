"""Buffers of a fixed size for each expert: tokens to their places, zeros where there is none.

The way back is `combine.gather_sum` over the places of each token. Shapes: T tokens, P places, D
model dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def fill(x_TD: Tensor, token_P: Tensor) -> Tensor:
    """Return (P, D): the row of each place's token.

    Args:
        x_TD: contiguous rows.
        token_P: int64 token of each place, -1 where it is empty.
    """
    num_places, dim = len(token_P), x_TD.shape[1]
    x_PD = torch.empty(num_places, dim, dtype=x_TD.dtype, device=x_TD.device)
    if x_PD.numel():
        block_d = min(1024, triton.next_power_of_2(dim))
        grid = (num_places, triton.cdiv(dim, block_d))
        fill_kernel[grid](x_TD, token_P, x_PD, dim, BLOCK_D=block_d, num_warps=4)
    return x_PD


@triton.jit
def fill_kernel(x, tokens, out, dim, BLOCK_D: tl.constexpr):
    """Copy a block of columns of the token of one place."""
    place = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(tokens + place)
    width = tl.where(token >= 0, dim, 0)
    row = tl.load(x + tl.maximum(token, 0) * dim + cols, mask=cols < width, other=0.0)
    tl.store(out + place * dim + cols, row, mask=cols < dim)
