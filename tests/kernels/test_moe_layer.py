"""A whole layer with the kernels, router to combine, against the same layer with torch."""

import pytest
import torch
from on_device import DEVICE, assert_close  # first: it skips this file where Triton is missing

from dmoe.moe import MoEConfig, MoEContext
from dmoe.moe.routing import BatchTotals

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
    "top p": ({"router": {"name": "top_p"}}, {}),
    "fp8": ({"dispatch_dtype": "fp8", "recompute_experts": True}, {}),
}
QUICK = {"a k for each token", "padding", "capacity", "fp8"}


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
