"""Initial weights: a function of the seed and of each weight's global name, never of the layout.

Matrices are normal with `init_std`; those that write to the residual stream are divided by
sqrt(2 num_layers) (GPT-2); with `init_scale` they are cut normal by their inputs instead (Switch,
arXiv 2101.03961, section 2.4); infinity-MoE and PEER have rules of their own, and modules that
say `starts_at_zero` do. Each expert has a stream of its own, under its global number.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dmoe.models.decoder import DecoderLM, is_expert
from dmoe.moe import infinite, peer
from dmoe.parallel import ParallelDims
from dmoe.rng import torch_generator

_EMBEDDINGS = ("embed.", "positions.")
_RESIDUAL_MAPS = ("o_proj.weight", "down_proj.weight", "w_down_EDF")


@torch.no_grad()
def init_weights(model: DecoderLM, *, seed: int, dims: ParallelDims) -> None:
    """Fill every parameter and buffer of `model`, sharded or not, in place."""
    config = model.config
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if getattr(model.get_submodule(name.rpartition(".")[0]), "starts_at_zero", False):
            local.zero_()
            continue
        if parameter.ndim == 1:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = residual_std if name.endswith(_RESIDUAL_MAPS) else config.init_std
        if ".deeper_neurons." in name:
            # Reads F neurons of mean square 1 where the first layer reads D numbers.
            std *= math.sqrt(config.dim / parameter.shape[1])
        draw = _normal
        if config.init_scale and not name.startswith(_EMBEDDINGS):
            std, draw = math.sqrt(config.init_scale / parameter.shape[-1]), _cut_normal
        for rule in (infinite.initial_std, peer.initial_std):
            own_std = rule(name, parameter.shape)
            std, draw = (std, draw) if own_std is None else (own_std, _normal)
        owned, rows = _owned(parameter)
        if is_expert(name):
            assert config.moe is not None
            first = dims.local_experts(config.moe.num_shards).start
            for index, expert in enumerate(range(first + owned.start, first + owned.stop)):
                full = draw(parameter.shape[1:], std, seed, f"{name}.{expert}")
                local[index].copy_(full[rows])
        else:
            local.copy_(draw(parameter.shape, std, seed, name)[owned, rows])
    for buffer in model.buffers():
        buffer.zero_()


def _normal(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    # Drawn on the host and in float32, so that every device and precision starts from one model.
    return torch.randn(shape, generator=torch_generator(seed, "init", name)) * std


def _cut_normal(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    generator = torch_generator(seed, "init", name)
    return torch.nn.init.trunc_normal_(torch.empty(shape), a=-2, b=2, generator=generator) * std


def _owned(parameter: Tensor) -> tuple[slice, slice]:
    """Return this rank's part of dims 0 and 1, of which FSDP cuts one as `torch.chunk` does."""
    parts = [slice(0, size) for size in parameter.shape[:2]]
    if isinstance(parameter, DTensor):
        [placement] = parameter.placements
        assert isinstance(placement, Shard)
        size, mesh = parameter.shape[placement.dim], parameter.device_mesh
        chunk = -(-size // mesh.size())
        start = min(mesh.get_local_rank() * chunk, size)
        parts[placement.dim] = slice(start, min(start + chunk, size))
    return parts[0], parts[1]
