"""A whole layer with the kernels, router to combine, against the same layer with torch."""

import pytest
import torch
from on_device import DEVICE, assert_close  # first: it skips this file where Triton is missing

from dmoe.moe import MoEConfig, MoEContext
from dmoe.moe.routing import BatchTotals
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

SEQUENCES, LENGTH, DIM = 3, 11, 16
TOKENS = SEQUENCES * LENGTH


def run(options: dict, context: dict, backend: str) -> list[torch.Tensor]:
    """Return output, losses, counts, and the gradients of the input and of all weights."""
    torch.manual_seed(0)
    config = {"num_experts": 6, "expert_ffn_dim": 16, "backend": backend, **options}
    layer = MoEConfig.model_validate(config).build(dim=DIM, activation="swiglu").to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(TOKENS, DIM).to(DEVICE).requires_grad_()
    totals = BatchTotals(TOKENS, TOKENS, SEQUENCES, 1)
    ids = torch.arange(TOKENS, device=DEVICE)
    made = MoEContext(LENGTH, token_ids_T=ids, totals=totals, **context)
    y, output = layer(x, made)
    loss = (y * torch.randn(TOKENS, DIM).to(DEVICE)).sum() + sum(output.losses.values())
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [y, *output.losses.values(), output.stats.counts_E, *gradients]


CASES = {
    "softmax": ({"router": {"name": "top_k", "top_k": 2}}, {}),
    "sigmoid": ({"router": {"name": "top_k", "top_k": 3, "score": "sigmoid"}}, {}),
    "Mixtral": ({"router": {"name": "top_k", "order": "select_then_score"}}, {}),
    "a k for each token": ({}, {"k_L": (torch.arange(TOKENS) % 4 + 1,)}),
    "padding": ({}, {"valid_T": torch.arange(TOKENS) % LENGTH < 7}),
    "a random subset": ({}, {"k_L": (2,), "k_ideal": 4}),
    "capacity": ({"capacity": {"factor": 1.0, "minimum": 1}}, {}),
    "capacity by score": ({"capacity": {"factor": 0.5, "policy": "score", "group": 7}}, {}),
    "buffers": (
        {"capacity": {"factor": 0.5, "minimum": 1}, "dispatch": "buffers"},
        {"k_L": (torch.arange(TOKENS) % 4 + 1,), "valid_T": torch.arange(TOKENS) % 5 > 0},
    ),
    "dropout": ({"expert_dropout": 0.4, "capacity": {"factor": 0.5, "minimum": 1}}, {}),
    "top p": ({"router": {"name": "top_p"}}, {}),
    "fp8": ({"dispatch_dtype": "fp8", "recompute_experts": True}, {}),
}
QUICK = {"a k for each token", "padding", "capacity", "buffers", "dropout", "fp8"}


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_equals_torch(name: str) -> None:
    options, context = CASES[name]
    moved = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for key, value in context.items()
    }
    if "k_L" in moved:
        moved["k_L"] = tuple(
            k.to(DEVICE) if isinstance(k, torch.Tensor) else k for k in moved["k_L"]
        )
    for got, want in zip(run(options, moved, "triton"), run(options, moved, "loop"), strict=True):
        assert_close(got, want, 5e-6)


def _buffers_between_two_ranks() -> None:
    """No size is read from the device, so rows that nobody sent are among those that arrive."""
    dims = ParallelDims.create(ep=2)
    options = {"capacity": {"factor": 0.7, "minimum": 1, "group": "sequence"}}
    config = {"num_experts": 6, "expert_ffn_dim": 16, "losses": {"load_balance_weight": 0}}
    x, dy = (t.chunk(2) for t in torch.randn(2, 4 * LENGTH, DIM, generator=_generator()))
    results = []
    for backend, layout, mine in (
        ("triton", dims, slice(dims.ep_rank, dims.ep_rank + 1)),
        ("loop", ParallelDims(), slice(0, 2)),
    ):
        section = {**config, **options, "backend": backend}
        section |= {"dispatch": "buffers"} if backend == "triton" else {}
        layer = MoEConfig.model_validate(section).build(dim=DIM, activation="swiglu", dims=layout)
        held = layout.local_experts(6)
        for name, parameter in layer.named_parameters():
            shape = (6, *parameter.shape[1:]) if "experts" in name else parameter.shape
            whole = 0.3 * torch.randn(shape, generator=_generator())
            parameter.data = whole[held.start : held.stop] if "experts" in name else whole
        leaf = torch.cat(x[mine]).requires_grad_()
        context = MoEContext(LENGTH, totals=BatchTotals(4 * LENGTH, 4 * LENGTH, 4, 2))
        y, output = layer(leaf, context)
        y.backward(torch.cat(dy[mine]))
        experts = [p.grad for name, p in layer.named_parameters() if "experts" in name]
        results.append((y, leaf.grad, experts, output.stats.dropped))
    (y, dx, experts, dropped), (all_y, all_dx, all_experts, all_dropped) = results
    rows = slice(dims.ep_rank * len(y), (dims.ep_rank + 1) * len(y))
    assert_close(y, all_y[rows], 5e-6)
    assert_close(dx, all_dx[rows], 5e-6)
    held = dims.local_experts(6)
    for got, want in zip(experts, all_experts, strict=True):
        assert_close(got, want[held.start : held.stop], 5e-6)
    assert 0 < dropped < all_dropped


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="two processes in the interpreter")
def test_buffers_between_ranks_equal_a_loop_on_one() -> None:
    run_distributed(_buffers_between_two_ranks, 2)
