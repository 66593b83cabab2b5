"""Rotary positions (arXiv 2104.09864): pairs of a head's numbers turned by the position's angles.

Shapes: B batch, H heads, S sequence, d width of a head. Its gradient is the turn back.
"""

from typing import Any

import torch
from torch import Tensor


def rotary_angles(
    positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of each position, (B, 1, S, d) each.

    Both halves of the width have the same angles; the first half of the sine is negated.

    Args:
        positions_BS: int64 place of each token in its document.
        head_dim: width d of a head.
        theta: base of the frequencies.
        dtype: of the result; the angles are computed in float32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=wide) / head_dim
    angles = positions_BS[:, None, :, None].to(wide) * theta**-exponent
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) by the angles of `rotary_angles`."""
    return _Rotate.apply(x_BHSd, cos, sin)


def rotate_loop(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Define `rotate`, as complex numbers times exp(i angle)."""
    first, second = x_BHSd.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos, sin).chunk(2, dim=-1)[1]
    return torch.cat((turned.real, turned.imag), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=direction)
