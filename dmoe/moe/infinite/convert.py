"""A model of blocks read as a model of neurons: the rows of W_z repeat within a block.

Shapes: E blocks, b neurons of a block, F = E b neurons, D model dim, Z latent dim.
"""

import torch
from torch import Tensor


def block_to_neuron(state: dict[str, Tensor], *, block_size: int, gated: bool) -> dict[str, Tensor]:
    """Return the weights of the neuron model that computes what a model of blocks does.

    Args:
        state: weights by name; those outside layers of blocks stay as they are.
        block_size: b.
        gated: whether experts have gates.
    """
    return dict(
        _converted(name, tensor, block_size=block_size, gated=gated)
        for name, tensor in state.items()
    )


def _converted(name: str, tensor: Tensor, *, block_size: int, gated: bool) -> tuple[str, Tensor]:
    parent, _, leaf = name.rpartition("moe.")
    if leaf == "router.gate.w_z_FZ":
        return f"{parent}moe.space.w_z_FZ", tensor.repeat_interleave(block_size, dim=0)
    if leaf.startswith("router.gate.latent."):
        return name.replace("router.gate.latent.", "router."), tensor
    if leaf == "experts.w_down_EDF":
        return f"{parent}moe.neurons.down_proj.weight", tensor.transpose(0, 1).flatten(1)
    if leaf in ("experts.w_gate_up_E2FD", "experts.w_up_EFD"):
        parts = tensor.chunk(2 if gated else 1, dim=1)
        # All gates, then all ups, which were apart by block.
        up_HD = torch.cat([part.flatten(0, 1) for part in parts])
        return f"{parent}moe.neurons.up_proj.weight", up_HD
    return name, tensor
