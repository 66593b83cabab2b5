"""Buffers of a fixed size for each expert, (E, C, D), and the way back: GShard's form of capacity.

Sizes depend on no routing, so nobody waits for the device to learn them. Empty places are zeros.
Shapes: T tokens, K slots per token, E experts, C places of an expert, P = E C, D model dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops.rows import RowMap, offsets_of, sum_rows
from dmoe.ops.slots import sort_slots


class Places(NamedTuple):
    """Which token each place holds, and the same seen from the tokens."""

    token_P: Tensor
    """(P,) int64 token of each place, or -1."""
    slot_P: Tensor
    """(P,) int64 slot t K + k of each place, or -1."""
    by_token_R: Tensor
    """(R,) int64 the places, ordered by token, as `RowMap.by_source_R`."""
    offsets_T1: Tensor
    """(T + 1,) int64 where each token's places begin in `by_token_R`."""
    counts_E: Tensor
    """(E,) int64 places of each expert that hold a token: the first ones."""


def places_of(
    expert_ids_TK: Tensor, num_experts: int, num_places: int, *, by_triton: bool = False
) -> Places:
    """Give each used slot a place of its expert, in the order of the tokens.

    Args:
        expert_ids_TK: (T, K) int64, -1 where a slot is unused.
        num_experts: E.
        num_places: C, which no expert has more slots than.
        by_triton: sort by the kernels; the host then waits for nothing.
    """
    slots_R, rows, counts_E = sort_slots(expert_ids_TK, num_experts, by_triton=by_triton)
    if not by_triton:
        assert max(counts_E.tolist(), default=0) <= num_places, (
            "an expert has more slots than places"
        )
    starts_E = offsets_of(counts_E)[:-1]
    place_C = torch.arange(num_places, device=slots_R.device)
    filled_P = (place_C < counts_E[:, None]).flatten()
    row_P = (starts_E[:, None] + place_C).flatten()
    # One slot more, for places that are empty; there may be no row at all.
    slots = torch.cat((slots_R, slots_R.new_full((1,), -1)))
    slot_P = slots[row_P.where(filled_P, len(slots_R))]
    # A row's place: that of its expert, and as far into it as the row is into the expert's rows.
    expert_R = expert_ids_TK.flatten()[slots_R].clamp(min=0)
    row_R = torch.arange(len(slots_R), device=slots_R.device)
    place_R = expert_R * num_places + row_R - starts_E[expert_R]
    token_P = slot_P.div(max(1, expert_ids_TK.shape[1]), rounding_mode="floor")
    return Places(token_P, slot_P, place_R[rows.by_source_R], rows.offsets_N1, counts_E)


def to_buffers(x_TD: Tensor, places: Places, *, by_triton: bool = False) -> Tensor:
    """Return (P, D): the row of each place's token, zeros where there is none."""
    return _ToBuffers.apply(x_TD, places, by_triton)


def from_buffers(y_PD: Tensor, places: Places, *, by_triton: bool = False) -> Tensor:
    """Return (T, D): the sum of each token's places."""
    return _FromBuffers.apply(y_PD, places, by_triton)


def to_buffers_loop(x_TD: Tensor, places: Places) -> Tensor:
    """Define `to_buffers`, a place at a time."""
    rows = [x_TD[t] if t >= 0 else torch.zeros_like(x_TD[:1].sum(0)) for t in places.token_P]
    return torch.stack(rows) if rows else x_TD[:0]


def from_buffers_loop(y_PD: Tensor, places: Places) -> Tensor:
    """Define `from_buffers`, a place at a time."""
    sums = [y_PD[:0].sum(0)] * (len(places.offsets_T1) - 1)
    for place, token in enumerate(places.token_P.tolist()):
        if token >= 0:
            sums[token] = sums[token] + y_PD[place]
    return torch.stack(sums) if sums else y_PD[:0]


def _fill(x_TD: Tensor, places: Places, by_triton: bool) -> Tensor:
    if by_triton:
        from dmoe_kernels.buffers import fill

        return fill(x_TD.contiguous(), places.token_P)
    if not len(x_TD):
        return x_TD.new_zeros(len(places.token_P), x_TD.shape[1])
    x_PD = x_TD.index_select(0, places.token_P.clamp(min=0))
    return x_PD.masked_fill_((places.token_P < 0)[:, None], 0)


def _sum(y_PD: Tensor, places: Places, by_triton: bool) -> Tensor:
    rows = RowMap(places.token_P, places.by_token_R, places.offsets_T1)
    return sum_rows(y_PD.contiguous(), rows, by_triton=by_triton)


class _ToBuffers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, places: Places, by_triton: bool) -> Tensor:
        ctx.places, ctx.by_triton = places, by_triton
        return _fill(x_TD, places, by_triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_PD: Tensor) -> tuple[Tensor, None, None]:
        return _sum(dx_PD, ctx.places, ctx.by_triton), None, None


class _FromBuffers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, places: Places, by_triton: bool) -> Tensor:
        ctx.places, ctx.by_triton = places, by_triton
        return _sum(y_PD, places, by_triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        return _fill(dy_TD, ctx.places, ctx.by_triton), None, None
