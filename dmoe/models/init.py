"""Initial weights: a function of the seed and of each weight's global name, never of the layout.

Matrices are normal with `init_std`; those that write to the residual stream are divided by
sqrt(2 num_layers) (GPT-2). Each expert has a stream of its own, under its global number.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.models.decoder import DecoderLM
from dmoe.parallel import ParallelDims
from dmoe.rng import torch_generator

_RESIDUAL_MAPS = ("o_proj.weight", "down_proj.weight", "w_down_EDF")


@torch.no_grad()
def init_weights(model: DecoderLM, *, seed: int, dims: ParallelDims) -> None:
    """Fill every parameter and buffer of `model`, sharded or not, in place."""
    config = model.config
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = residual_std if name.endswith(_RESIDUAL_MAPS) else config.init_std
        if ".experts." in name:
            assert config.moe is not None
            first = dims.local_experts(config.moe.num_experts).start + _offset(parameter)
            for index, expert in enumerate(local):
                _fill_normal(expert, std, seed, f"{name}.{first + index}")
        else:
            full = torch.empty(parameter.shape, dtype=local.dtype)
            _fill_normal(full, std, seed, name)
            local.copy_(full.narrow(0, _offset(parameter), len(local)))
    for buffer in model.buffers():
        buffer.zero_()


def _fill_normal(weight: Tensor, std: float, seed: int, name: str) -> None:
    # Drawn on the host and in float32, so that every device and precision starts from one model.
    generator = torch_generator(seed, "init", name)
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def _offset(parameter: Tensor) -> int:
    """Return where this rank's slice of dim 0 begins; FSDP cuts it as `torch.chunk` does."""
    if not isinstance(parameter, DTensor):
        return 0
    rank, size = parameter.device_mesh.get_local_rank(), parameter.device_mesh.size()
    chunk = -(-parameter.shape[0] // size)
    return min(rank * chunk, parameter.shape[0])
