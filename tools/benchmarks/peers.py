"""The MoE layers of others, with our weights, as functions from x_TD to what is differentiated.

Shapes: T tokens, D model dim, F expert dim, E experts, K slots per token.
"""

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.moe import MoELayer

Layer = tuple[nn.Module, Callable[[Tensor], list[Tensor]]]


def hugging_face(ours: MoELayer, dtype: torch.dtype, implementation: str) -> Layer | None:
    """Build `Qwen3MoeSparseMoeBlock`, or return None where transformers is not installed."""
    if find_spec("transformers") is None:
        return None
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    num_experts, dim, ffn_dim = ours.experts.w_down_EDF.shape
    config = Qwen3MoeConfig(
        hidden_size=dim,
        moe_intermediate_size=ffn_dim,
        num_experts=num_experts,
        num_experts_per_tok=ours.config.router.top_k,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    block: Any = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.gate.weight)
        block.experts.gate_up_proj.copy_(ours.experts.w_gate_up_E2FD)
        block.experts.down_proj.copy_(ours.experts.w_down_EDF)
    block.to(dtype)
    return block, lambda x_TD: [block(x_TD[None]).squeeze(0)]


def deepspeed(ours: MoELayer, dtype: torch.dtype, capacity_factor: float) -> Layer | None:
    """Build DeepSpeed's `MoE` with capacity, or return None where it is not installed.

    The first run on a machine compiles its communication extension, which can take minutes.
    """
    if find_spec("deepspeed") is None:
        return None
    # Read when DeepSpeed is imported; one process needs no launcher.
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    import deepspeed as ds
    from deepspeed.moe.layer import MoE

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not ds.comm.is_initialized():
        ds.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    num_experts, dim, ffn_dim = ours.experts.w_down_EDF.shape
    layer: Any = MoE(
        dim,
        SwiGLU(dim, ffn_dim),
        num_experts=num_experts,
        k=ours.config.router.top_k,
        capacity_factor=capacity_factor,
        use_rts=False,
    )
    layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(ours.router.gate.weight)
        for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.up.weight.copy_(ours.experts.w_gate_up_E2FD[index])
            expert.down.weight.copy_(ours.experts.w_down_EDF[index])
    layer.to(dtype)
    return layer, lambda x_TD: list(layer(x_TD)[:2])


def plain_loop(ours: MoELayer, dtype: torch.dtype) -> Layer:
    """Build what one writes first: top-k, then for each expert select, compute and index_add."""
    num_experts, dim, ffn_dim = ours.experts.w_down_EDF.shape
    gate = nn.Linear(dim, num_experts, bias=False)
    experts = nn.ModuleList(SwiGLU(dim, ffn_dim) for _ in range(num_experts))
    with torch.no_grad():
        gate.weight.copy_(ours.router.gate.weight)
        for index, expert in enumerate(experts):
            expert.up.weight.copy_(ours.experts.w_gate_up_E2FD[index])
            expert.down.weight.copy_(ours.experts.w_down_EDF[index])
    module = nn.ModuleDict({"gate": gate, "experts": experts}).to(dtype)

    def forward(x_TD: Tensor) -> list[Tensor]:
        scores_TE = gate(x_TD).float().softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(ours.config.router.top_k)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(dtype)
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(experts):
            token, slot = torch.where(ids_TK == index)
            y_TD = y_TD.index_add(0, token, expert(x_TD[token]) * weights_TK[token, slot, None])
        return [y_TD]

    return module, forward


class SwiGLU(nn.Module):
    """One expert."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
