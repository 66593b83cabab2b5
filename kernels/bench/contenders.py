"""Who is measured: ours, two ways in plain torch, and every other package that is importable.

A contender is a function from a problem and its leaves to the output; one that cannot run here
raises, and the table says why. Peers are called as their own documentation has it.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dmoe_kernels.experts import experts_backward, experts_forward
from dmoe_kernels.routing import select, weigh, weigh_backward
from dmoe_kernels.slots import sort_slots
from problem import Problem, Shape
from torch import Tensor

Contender = Callable[[Problem, list[Tensor]], Tensor]


class _Ours(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        ids_TK: Tensor,
        fp8: bool,
    ) -> Tensor:
        slots_R, *row_map, counts_E = sort_slots(ids_TK, len(w_up))
        weights_R = weights_TK.flatten().index_select(0, slots_R)
        y_TD, z_RH = experts_forward(
            x_TD, tuple(row_map), weights_R, counts_E, w_up, w_down, "swiglu", fp8=fp8
        )
        ctx.fp8 = fp8
        ctx.save_for_backward(x_TD, weights_R, w_up, w_down, z_RH, counts_E, slots_R, *row_map)
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_R, w_up, w_down, z_RH, counts_E, slots_R, *row_map = ctx.saved_tensors
        dx_TD, dweights_R, dw_up, dw_down = experts_backward(
            dy_TD.contiguous(),
            x_TD,
            z_RH,
            tuple(row_map),
            weights_R,
            counts_E,
            w_up,
            w_down,
            "swiglu",
            w_up.dtype,
            fp8=ctx.fp8,
        )
        dweights_TK = torch.empty_like(dweights_R).scatter_(0, slots_R, dweights_R)
        return dx_TD, dweights_TK.view(len(x_TD), -1), dw_up, dw_down, None, None


def ours(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run the kernels of this package, sort of the slots included."""
    return _Ours.apply(*leaves, problem.ids_TK, False)


def ours_in_eight_bits(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run them with the products of the forward pass and of dx in eight bits (sm_90)."""
    return _Ours.apply(*leaves, problem.ids_TK, True)


_GATES = {"score": "softmax", "over_choice": False, "normalize": True, "scale": 1.0}


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        ctx.save_for_backward(logits_TE, ids_TK)
        return weigh(logits_TE, ids_TK, **_GATES)[1]

    @staticmethod
    def backward(ctx: Any, dweights_TK: Tensor) -> tuple[Tensor, None]:
        return weigh_backward(*ctx.saved_tensors, None, dweights_TK.contiguous(), **_GATES), None


def our_layer(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run the kernels of a whole layer: choose experts by the logits, weigh them, run them."""
    x_TD, logits_TE, w_up, w_down = leaves
    top_k = problem.shape.top_k
    ids_TK = select(logits_TE.detach(), None, None, None, top_k=top_k, score="softmax")
    return _Ours.apply(x_TD, _Weigh.apply(logits_TE, ids_TK), w_up, w_down, ids_TK, False)


def torch_layer(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Define `our_layer`."""
    x_TD, logits_TE, w_up, w_down = leaves
    gates_TK = logits_TE.softmax(-1).gather(1, problem.ids_TK)
    weights_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return torch_loop(problem, [x_TD, weights_TK, w_up, w_down])


def torch_loop(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run an expert after the other: what defines the result."""
    x_TD, weights_TK, w_up, w_down = leaves
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for expert, (up, down) in enumerate(zip(w_up, w_down, strict=True)):
        tokens, slots = (problem.ids_TK == expert).nonzero(as_tuple=True)
        gate, value = F.linear(x_TD[tokens], up).chunk(2, -1)
        rows = F.linear(F.silu(gate) * value, down) * weights_TK[tokens, slots, None]
        y_TD = y_TD.index_add(0, tokens, rows.float())
    return y_TD.to(x_TD.dtype)


def grouped_mm(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run `torch.nn.functional.grouped_mm` on rows that are gathered before, summed after."""
    x_TD, weights_TK, w_up, w_down = leaves
    slots_R = problem.ids_TK.flatten().argsort(stable=True)
    tokens_R = slots_R // problem.shape.top_k
    counts_E = torch.bincount(problem.ids_TK.flatten(), minlength=len(w_up))
    ends = counts_E.cumsum(0).to(torch.int32)
    gate, value = F.grouped_mm(x_TD[tokens_R], w_up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * value, w_down.transpose(1, 2), offs=ends)
    rows = rows * weights_TK.flatten()[slots_R, None].to(rows.dtype)
    return torch.zeros_like(x_TD).index_add(0, tokens_R, rows)


def hugging_face(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run transformers' experts of Qwen3 with its grouped_mm."""
    x_TD, weights_TK, w_up, w_down = leaves
    return torch.func.functional_call(
        _qwen3_experts(problem.shape),
        {"gate_up_proj": w_up, "down_proj": w_down},
        (x_TD, problem.ids_TK, weights_TK.to(x_TD.dtype)),
    )


@functools.lru_cache
def _qwen3_experts(shape: Shape) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.ffn_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def liger(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run Liger's fused MoE."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    x_TD, weights_TK, w_up, w_down = leaves
    return LigerFusedMoEFunction.apply(x_TD, w_up, w_down, problem.ids_TK.int(), weights_TK)


def scattermoe(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run ScatterMoE's linears; its gated network would take the up rows before the gate rows."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    x_TD, weights_TK, w_up, w_down = leaves
    order = flatten_sort_count(problem.ids_TK, num_experts=len(w_up))
    gate, value = parallel_linear(
        x_TD, w_up.transpose(1, 2), problem.shape.top_k, *order, grouped_out=True
    ).chunk(2, -1)
    return parallel_linear(
        F.silu(gate) * value,
        w_down.transpose(1, 2),
        1,
        *order,
        gates=weights_TK.to(x_TD.dtype),
        grouped_in=True,
    )


def sonicmoe(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run SonicMoE with the routing given, as transformers calls it."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    x_TD, weights_TK, w_up, w_down = leaves
    tokens = torch.arange(len(x_TD), device=x_TD.device, dtype=torch.int32)
    y_TD, *_ = moe_general_routing_inputs(
        x_TD,
        weights_TK.flatten(),
        tokens.repeat_interleave(problem.shape.top_k),
        problem.ids_TK.flatten().int(),
        w_up.permute(1, 2, 0),
        None,
        w_down.permute(1, 2, 0),
        None,
        problem.shape.num_experts,
        torch.cuda.current_stream().cuda_stream,
        ActivationType.SWIGLU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,  # gate rows, then up rows; without it they alternate
    )
    return y_TD


def megablocks(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """Run the grouped GEMM of MegaBlocks in place of torch's."""
    from megablocks.grouped_gemm_util import ops

    x_TD, weights_TK, w_up, w_down = leaves
    slots_R = problem.ids_TK.flatten().argsort(stable=True)
    tokens_R = slots_R // problem.shape.top_k
    counts = torch.bincount(problem.ids_TK.flatten(), minlength=len(w_up)).cpu()
    gate, value = ops.gmm(x_TD[tokens_R], w_up, counts, trans_b=True).chunk(2, -1)
    rows = ops.gmm(F.silu(gate) * value, w_down, counts, trans_b=True)
    rows = rows * weights_TK.flatten()[slots_R, None].to(rows.dtype)
    return torch.zeros_like(x_TD).index_add(0, tokens_R, rows)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "ours, fp8": ours_in_eight_bits,
    "torch loop": torch_loop,
    "grouped_mm": grouped_mm,
    "transformers": hugging_face,
    "Liger": liger,
    "ScatterMoE": scattermoe,
    "SonicMoE": sonicmoe,
    "MegaBlocks": megablocks,
}
TOLERANCES = {"ours": 1e-2, "ours, fp8": 0.1}
"""The largest error that passes; 3.9e-3 and 6.6e-2 were measured."""
PEERS = ("ScatterMoE", "MegaBlocks", "Liger", "SonicMoE")
"""Packages with kernels of their own; the last two tune for minutes."""
_PACKAGES = {
    "transformers": "transformers",
    "ScatterMoE": "scattermoe",
    "MegaBlocks": "megablocks",
    "Liger": "liger_kernel",
    "SonicMoE": "sonicmoe",
}


def runs_here(name: str) -> bool:
    """Say whether a contender's package is installed, and whether the GPU has its numbers."""
    if name == "ours, fp8":
        return not torch.version.hip and torch.cuda.get_device_capability()[0] == 9
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None
