"""Routing, sort and experts together over the matrix of sizes, loads and types; slow, so apart."""

import itertools

import pytest
import torch
from on_device import DEVICE, assert_close  # first: it skips this file where Triton is missing

from dmoe.ops import expert_ffn, expert_ffn_loop, sort_slots
from dmoe.ops.routing import GateForm, select_experts, weigh_experts, weigh_experts_torch

pytest.importorskip("dmoe_kernels.experts")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
TOKENS = (0, 1, 37, 128, 129)
SIZES = ((1, 1), (2, 5), (3, 8), (8, 64))  # slots and experts
LOADS = ("random", "balanced", "one expert", "ties", "some never")
FORM = GateForm("softmax", over_choice=False, normalize=True, scale=1.0)


def logits_of(load: str, tokens: int, experts: int) -> torch.Tensor:
    logits = torch.randn(tokens, experts)
    if load == "balanced":
        logits[torch.arange(tokens), torch.arange(tokens) % experts] += 20
    elif load == "one expert":
        logits[:, -1] += 20
    elif load == "ties":
        logits = torch.randint(0, 2, logits.shape).float()
    elif load == "some never":
        logits[:, 1 : experts // 2 : 2] = -torch.inf
    return logits


def cases():
    """Every size with every load once, types and activations in turn."""
    turns = zip(itertools.cycle(TOLERANCE), itertools.cycle(("swiglu", "gelu")), strict=False)
    for (tokens, sizes, load), (dtype, activation) in zip(
        itertools.product(TOKENS, SIZES, LOADS), turns, strict=False
    ):
        yield pytest.param(tokens, *sizes, load, dtype, activation)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "k", "experts", "load", "dtype", "activation"), [*cases()])
def test_equals_the_twins(tokens, k, experts, load, dtype, activation) -> None:
    torch.manual_seed(0)
    dim, ffn_dim = 24, 40
    width = 2 * ffn_dim if activation == "swiglu" else ffn_dim
    logits = logits_of(load, tokens, experts)
    x = torch.randn(tokens, dim).to(dtype)
    w_up = (torch.randn(experts, width, dim) * dim**-0.5).to(dtype)
    w_down = (torch.randn(experts, dim, ffn_dim) * ffn_dim**-0.5).to(dtype)
    dy = torch.randn(tokens, dim).to(dtype)
    bias = torch.zeros(experts, device=DEVICE)
    ids = select_experts(logits.to(DEVICE), bias, k, k, None, "softmax")

    def run(by_triton: bool) -> list[torch.Tensor]:
        device = DEVICE if by_triton else "cpu"
        leaves = [t.to(device) for t in (x, logits, w_up, w_down)]
        leaves = [t if by_triton else t.double() for t in leaves]
        x_TD, logits_TE, up, down = (t.clone().requires_grad_() for t in leaves)
        weigh = weigh_experts if by_triton else weigh_experts_torch
        _, weights = weigh(logits_TE, ids.to(device), FORM)
        slots, rows, counts = sort_slots(ids.to(device), experts, by_triton=by_triton)
        ffn = expert_ffn if by_triton else expert_ffn_loop
        options = {"backend": "triton"} if by_triton else {}
        y = ffn(
            x_TD,
            rows,
            weights.flatten().index_select(0, slots),
            counts,
            up,
            down,
            activation=activation,
            **options,
        )
        gradients = torch.autograd.grad(y, [x_TD, logits_TE, up, down], dy.to(device).to(y.dtype))
        return [y, *gradients]

    got = run(by_triton=True)
    if not tokens:
        assert not any(t.any() for t in got)
        return
    want = run(by_triton=False)
    for a, b in zip(got, want, strict=True):
        # Gates of one expert are 1 whatever the logits: their gradient is 0 but for rounding.
        if b.norm() < 1e-9 * (1 + dy.double().norm()):
            assert a.double().norm() < 1e-4
        else:
            assert_close(a, b, TOLERANCE[dtype])
