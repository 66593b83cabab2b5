"""Ways to make one rank's numbers NaN for the length of a `with` block."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dmoe.engine import NativeEngine, passes
from dmoe.models import lm_loss
from dmoe.models.decoder import DecoderLM

MOE_LAYER = 1

Poison = Callable[[NativeEngine], AbstractContextManager[None]]


def nan_like(gradient: Tensor) -> Tensor:
    return gradient * math.nan


@contextmanager
def expert_gradient(engine: NativeEngine) -> Iterator[None]:
    """The gradient of an expert's weight, as the backward pass leaves it."""
    handle = moe(engine.model).experts.w_down_EDF.register_hook(nan_like)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def gate_gradient(engine: NativeEngine) -> Iterator[None]:
    """The gradient of the router's weight; when sharded, of the gathered one that forward uses."""
    with ExitStack() as stack:

        def watch(gate: nn.Module, inputs: object) -> None:
            stack.callback(gate.weight.register_hook(nan_like).remove)

        stack.callback(moe(engine.model).router.gate.register_forward_pre_hook(watch).remove)
        yield


@contextmanager
def embedding_row(engine: NativeEngine) -> Iterator[None]:
    """What the table gives for one token of this rank's data."""

    def spoil(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor([3]), math.nan)

    handle = engine.model.embed.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def parameter(engine: NativeEngine) -> Iterator[None]:
    """A row of a matrix, in the share of it that this rank holds."""
    weight = engine.model.layers[MOE_LAYER].attn.o_proj.weight.detach()
    row = (weight.to_local() if isinstance(weight, DTensor) else weight)[0]
    healthy = row.clone()
    row.fill_(math.nan)
    try:
        yield
    finally:
        row.copy_(healthy)


@contextmanager
def loss(engine: NativeEngine) -> Iterator[None]:
    """The loss, after a forward pass that is finite."""
    with patch.object(passes, "lm_loss", lambda logits, labels: lm_loss(logits, labels) * math.nan):
        yield


ALL: dict[str, Poison] = {
    poison.__name__: poison
    for poison in (expert_gradient, gate_gradient, embedding_row, parameter, loss)
}


def moe(model: DecoderLM) -> nn.Module:
    layer = model.layers[MOE_LAYER].moe
    assert layer is not None
    return layer
