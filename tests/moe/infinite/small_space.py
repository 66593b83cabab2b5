"""A small continuous space of experts, for the tests of its parts."""

from typing import Any

import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, SparseLayer

TOKENS, SEQ_LEN, DIM, WIDTH, BLOCK = 12, 6, 16, 32, 8
VALID_T = torch.arange(TOKENS) < 10


def build(activation: str = "swiglu", *, moe: dict[str, Any] | None = None, **infinite) -> Any:
    """Build a float64 layer with weights of size 1."""
    section = {"ffn_dim": WIDTH, "latent_dim": 4, "samples": 3, **infinite}
    config = MoEConfig.model_validate({"infinite": section, **(moe or {})})
    layer: SparseLayer = config.build(dim=DIM, activation=activation).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator).mul_(0.5)
    return layer


def build_block(activation: str = "swiglu", **infinite) -> Any:
    """Build a layer of blocks."""
    infinite = {"granularity": "block", "block_size": BLOCK, **infinite}
    return build(activation, **{"active_fraction": 0.5, **infinite})


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64).requires_grad_()


def context(*, training: bool = True, **changes: Any) -> MoEContext:
    """A micro-batch whose last two tokens are padding."""
    totals = BatchTotals(10, 10, 2, 1) if training else None
    numbers = {"valid_T": VALID_T, "token_ids_T": torch.arange(TOKENS), "totals": totals}
    return MoEContext(**{"seq_len": SEQ_LEN, **numbers, **changes})


def gradients(y_TD: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a sum over y with a weight of its own for each number."""
    dy_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    return torch.autograd.grad((y_TD * dy_TD).sum(), leaves)
