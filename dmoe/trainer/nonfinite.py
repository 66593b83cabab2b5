"""Finds where numbers stopped being finite, once a run is about to be given up for it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dmoe.data import MicroBatch
from dmoe.engine import Engine, StepPosition


class NonFiniteError(RuntimeError):
    """Training cannot go on: loss or gradient stay NaN or infinite."""


def find_non_finite(engine: Engine, batches: Sequence[MicroBatch], position: StepPosition) -> str:
    """Say which parameter, module output or gradient of this rank is the first that is not finite.

    The step is run once more with a hook on every module, so every rank must call this.
    """
    model = engine.model
    bad_parameters = [name for name, p in model.named_parameters() if not _is_finite(p)]
    bad_outputs: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(map(_is_finite, tree_leaves(output))):
                bad_outputs.append(name)

        return hook

    bad_gradients: set[str] = set()

    def look(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not _is_finite(gradient):
                bad_gradients.add(name)

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    # DeepSpeed takes gradients away as soon as they are made; FSDP makes those of shards itself.
    hooks += [p.register_hook(look(name)) for name, p in model.named_parameters()]
    try:
        engine.skip()
        engine.forward_backward(batches, position)
    finally:
        for hook in hooks:
            hook.remove()
    if bad_parameters:
        return f"parameter {bad_parameters[0]} is not finite"
    if bad_outputs:
        return f"the output of {bad_outputs[0]} was the first that is not finite"
    # Backward visits the layers from the last to the first.
    for name, p in reversed(list(model.named_parameters())):
        if name in bad_gradients or (p.grad is not None and not _is_finite(p.grad)):
            return f"the forward pass is finite; the gradient of {name} is not"
    return "every number of this rank is finite: another rank tells the place"


def _is_finite(value: Any) -> bool:
    if isinstance(value, DTensor):
        value = value.to_local()
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
