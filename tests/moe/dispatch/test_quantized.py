"""Rows sent in eight bits: what goes over the wire, and what comes out of a layer."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from dmoe.config.base import ConfigError
from dmoe.moe import BatchTotals, MoEConfig, MoEContext
from dmoe.moe.dispatch import LocalDispatcher, build_dispatcher
from dmoe.moe.routing import make_routing
from dmoe.ops.wire import dequantize_rows, quantize_rows
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

DIM, EXPERTS, TOKENS = 256, 4, 6


def _sent_by_a_step(dtype: Any) -> list[tuple[str, int]]:
    """Return dtype and bytes a row of what each exchange of forward and backward sends."""
    sent = []
    exchange = dist.all_to_all_single

    def watch(output: torch.Tensor, rows: torch.Tensor, *args: Any, **options: Any) -> Any:
        if args:  # the counts themselves have no splits
            name = str(rows.dtype).removeprefix("torch.")
            sent.append((name, rows.nbytes // len(rows)))
        return exchange(output, rows, *args, **options)

    dist.all_to_all_single = watch
    dims = ParallelDims.create(ep=2)
    dispatcher = build_dispatcher("auto", num_experts=EXPERTS, dims=dims, dtype=dtype)
    x = torch.randn(TOKENS, DIM).bfloat16().requires_grad_()
    logits = torch.zeros(TOKENS, EXPERTS)
    ids = torch.arange(TOKENS)[:, None] % EXPERTS
    routing = make_routing(logits, logits, ids, torch.ones(TOKENS, 1, requires_grad=True))
    rows, _, handle = dispatcher.dispatch(x, routing)
    y = dispatcher.combine(rows.x_ND * 2 + rows.weights_R[:1].bfloat16(), handle)
    y.sum().backward()
    dist.all_to_all_single = exchange
    return sent


def test_the_way_to_the_experts_takes_a_byte_a_number() -> None:
    """256 numbers, 2 scales, and 14 zeros to whole 16 bytes; in bfloat16 it is 512 bytes."""
    whole = ("bfloat16", 2 * DIM)
    for dtype, rows in (("fp8", ("uint8", 272)), ("same", whole)):
        for sent in run_distributed(_sent_by_a_step, 2, dtype):
            # Rows, gates, results; backward results, then gates and rows in either order.
            assert sent[:3] == [rows, ("float32", 4), whole]
            assert sorted(sent[3:]) == sorted([whole, ("float32", 4), whole])


def test_one_rank_rounds_alike_and_the_gradient_passes() -> None:
    x = torch.randn(TOKENS, DIM, requires_grad=True)
    logits = torch.zeros(TOKENS, EXPERTS)
    ids = torch.zeros(TOKENS, 1, dtype=torch.int64)
    routing = make_routing(logits, logits, ids, torch.ones(TOKENS, 1))
    dispatcher = LocalDispatcher(num_experts=EXPERTS, dtype="fp8")
    rows, _, _ = dispatcher.dispatch(x, routing)
    assert torch.equal(rows.x_ND, dequantize_rows(quantize_rows(x), DIM, torch.float32))
    dx = torch.randn(TOKENS, DIM)
    assert torch.equal(torch.autograd.grad(rows.x_ND, x, dx)[0], dx)
    exact, _, _ = dispatcher.dispatch(x, routing, exact=True)
    assert torch.equal(exact.x_ND, x)


def layer_output(**options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=EXPERTS, expert_ffn_dim=32, num_shared_experts=1, **options)
    layer = config.build(dim=DIM, activation="swiglu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    totals = BatchTotals(TOKENS, TOKENS, 1, 1)
    context = MoEContext(TOKENS, token_ids_T=torch.arange(TOKENS), totals=totals)
    return layer(torch.randn(TOKENS, DIM), context)[0]


@pytest.mark.parametrize("options", [{}, {"expert_dropout": 0.3}])
def test_a_layer_differs_by_the_rounding_alone(options: dict[str, Any]) -> None:
    """Expert dropout sends the numbers of the tokens the same way, which must not be rounded."""
    want = layer_output(**options)
    error = (layer_output(dispatch_dtype="fp8", **options) - want).norm() / want.norm()
    assert 1e-3 < error < 0.05


def test_is_refused_where_no_token_is_sent() -> None:
    for options in (
        {"num_experts": 4, "expert_ffn_dim": 8, "router": {"name": "soft_moe"}},
        {"infinite": {"granularity": "neuron", "ffn_dim": 64}},
    ):
        with pytest.raises((ConfigError, ValidationError), match="dispatch_dtype"):
            MoEConfig.model_validate(options | {"dispatch_dtype": "fp8"})
    with pytest.raises(ValidationError, match="dispatch_dtype"):
        MoEConfig.model_validate({"num_experts": 4, "expert_ffn_dim": 8, "dispatch_dtype": "int8"})
