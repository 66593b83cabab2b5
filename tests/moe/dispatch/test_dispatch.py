"""Dispatchers: local is a loop over slots; all-to-all on 2 and 4 ranks is local on all the tokens.

The experts here are x -> tanh(scale x), so that outputs and all gradients depend on who got what.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.moe.dispatch import (
    AllToAllDispatcher,
    BufferDispatcher,
    DispatchDtype,
    Dispatcher,
    DispatchName,
    LocalDispatcher,
    Rows,
    build_dispatcher,
)
from dmoe.moe.routing import make_routing
from dmoe.ops import gather_sum
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

DIM, EXPERTS, TOP_K = 3, 8, 2
PLACES = 14
"""Of each expert in a buffer: as many as the slots of any process here that has one."""


class Scenario(NamedTuple):
    """The tokens of all ranks, one rank after the other."""

    sizes: list[int]
    ids_TK: Tensor


def scenarios(world_size: int) -> dict[str, Scenario]:
    sizes = [5, 2, 4, 3][:world_size]
    generator = torch.Generator().manual_seed(world_size)
    random_TK = torch.rand(sum(sizes), EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    rank_T1 = torch.arange(world_size).repeat_interleave(torch.tensor(sizes))[:, None]
    nothing = torch.zeros(0, TOP_K, dtype=torch.int64)
    return {
        "random": Scenario(sizes, random_TK),
        "unused slots": Scenario(sizes, random_TK.masked_fill(random_TK > 4, -1)),
        "all to one expert": Scenario(sizes, torch.full_like(random_TK, 6)),
        "an expert without tokens": Scenario(sizes, random_TK.masked_fill(random_TK == 0, 1)),
        "a rank of padding": Scenario(sizes, random_TK.masked_fill(rank_T1 == 1, -1)),
        "a rank without tokens": Scenario([0, *sizes[1:]], random_TK[sizes[0] :]),
        "nothing routed": Scenario(sizes, torch.full_like(random_TK, -1)),
        "no tokens": Scenario([0] * world_size, nothing),
    }


def leaves_of(num_tokens: int) -> tuple[Tensor, ...]:
    """Return x_TD, gates, expert scales and the gradient of the output, all float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, DIM), (num_tokens, TOP_K), (EXPERTS, DIM), (num_tokens, DIM)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def run_experts(rows: Rows, counts_e: Tensor, scale_eD: Tensor) -> Tensor:
    expert_R = torch.arange(len(counts_e)).repeat_interleave(counts_e)
    y_RD = torch.tanh(scale_eD[expert_R] * rows.gather()) * rows.weights_R[:, None]
    return gather_sum(y_RD, rows.map)


def forward_backward(
    dispatcher: Dispatcher, ids_TK: Tensor, leaves: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, gates and scales."""
    *inputs, dy = leaves
    x, gates, scale = (t.clone().requires_grad_() for t in inputs)
    logits_TE = torch.zeros(len(x), EXPERTS)
    routing = make_routing(logits_TE, logits_TE, ids_TK, gates)._replace(num_places=PLACES)
    rows, counts_e, handle = dispatcher.dispatch(x, routing)
    y = dispatcher.combine(run_experts(rows, counts_e, scale), handle)
    return y.detach(), *torch.autograd.grad(y, (x, gates, scale), dy)


def loop(ids_TK: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Define dispatch, experts and combine, a slot at a time."""
    *inputs, dy = leaves
    x, gates, scale = (t.clone().requires_grad_() for t in inputs)
    y = x * 0 + gates.sum() * 0 + scale.sum() * 0
    for token, ids in enumerate(ids_TK.tolist()):
        for slot, expert in enumerate(ids):
            if expert >= 0:
                row = torch.tanh(scale[expert] * x[token]) * gates[token, slot]
                y = y.index_add(0, torch.tensor([token]), row[None])
    return y.detach(), *torch.autograd.grad(y, (x, gates, scale), dy)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dispatcher",
    [LocalDispatcher(num_experts=EXPERTS), BufferDispatcher(num_experts=EXPERTS, group=None)],
    ids=["local", "buffers"],
)
@pytest.mark.parametrize(("name", "scenario"), scenarios(2).items())
def test_equals_the_loop(name, scenario, dispatcher) -> None:
    leaves = leaves_of(sum(scenario.sizes))
    actual = forward_backward(dispatcher, scenario.ids_TK, leaves)
    assert_close(actual, loop(scenario.ids_TK, leaves))


def test_rows_are_sorted_by_expert_then_token() -> None:
    ids_TK = torch.tensor([[2, 0], [-1, 2], [0, -1]])
    x_TD = torch.arange(3.0)[:, None].expand(3, DIM)
    routing = make_routing(torch.zeros(3, 3), torch.zeros(3, 3), ids_TK, torch.rand(3, 2))
    rows, counts_e, _ = LocalDispatcher(num_experts=3).dispatch(x_TD, routing)
    assert counts_e.tolist() == [2, 0, 2]
    assert rows.gather()[:, 0].tolist() == [0, 2, 0, 1]
    expected = routing.weights_TK[[0, 2, 0, 1], [1, 0, 0, 1]]
    assert torch.equal(rows.weights_R, expected)


def _compare_with_local(ep: int, dtype: DispatchDtype, way: DispatchName = "auto") -> None:
    """Compare every scenario over the ranks of each expert-parallel group."""
    dims = ParallelDims.create(ep=ep)
    dispatcher = build_dispatcher(way, num_experts=EXPERTS, dims=dims, dtype=dtype)
    assert isinstance(dispatcher, AllToAllDispatcher if way == "auto" else BufferDispatcher)
    experts = dims.local_experts(EXPERTS)
    for name, (sizes, ids_TK) in scenarios(ep).items():
        x, gates, scale, dy = leaves = leaves_of(sum(sizes))
        local = LocalDispatcher(num_experts=EXPERTS, dtype=dtype)
        y, dx, dgates, dscale = forward_backward(local, ids_TK, leaves)
        start = sum(sizes[: dims.ep_rank])
        mine = slice(start, start + sizes[dims.ep_rank])
        held = slice(experts.start, experts.stop)
        shares = (x[mine], gates[mine], scale[held], dy[mine])
        actual = forward_backward(dispatcher, ids_TK[mine], shares)
        try:
            assert_close(actual, (y[mine], dx[mine], dgates[mine], dscale[held]))
        except AssertionError as error:
            raise AssertionError(f"ep {ep}, {dtype}, {way}, scenario: {name}") from error

    with pytest.raises(ConfigError, match=rf"dispatch = local .* parallel.ep = {ep}"):
        build_dispatcher("local", num_experts=EXPERTS, dims=dims)


def _compare_on_groups_of_two_and_four() -> None:
    for dtype in ("same", "fp8"):
        _compare_with_local(2, dtype)
        _compare_with_local(4, dtype)

    for ep in (2, 4):
        _compare_with_local(ep, "same", "buffers")


def test_others_equal_local_on_all_the_tokens() -> None:
    run_distributed(_compare_on_groups_of_two_and_four, 4)


@pytest.mark.parametrize("name", ["auto", "local", "all_to_all"])
def test_one_rank_dispatches_locally(name) -> None:
    dispatcher = build_dispatcher(name, num_experts=EXPERTS, dims=ParallelDims())
    assert isinstance(dispatcher, LocalDispatcher)
