"""The only door to the kernels: one op a file, its slow twin beside it."""

from dmoe.ops.activation import Activation
from dmoe.ops.backend import Backend, ResolvedBackend, resolve_backend, tune_kernels, uses_kernels
from dmoe.ops.buffers import Places, from_buffers, places_of, to_buffers
from dmoe.ops.expert_capacity import CapacityRule, keep_slots
from dmoe.ops.expert_ffn import expert_ffn, expert_ffn_loop
from dmoe.ops.fp8 import ExpertDtype
from dmoe.ops.grouped_mm import grouped_mm
from dmoe.ops.linear import Linear, linear
from dmoe.ops.rms_norm import rms_norm
from dmoe.ops.rotary import rotary_angles, rotate
from dmoe.ops.router_gate import router_gate
from dmoe.ops.rows import RowMap, gather, gather_sum
from dmoe.ops.slots import count_slots, sort_slots
from dmoe.ops.top_k import top_k_ids

__all__ = [
    "Activation",
    "Backend",
    "CapacityRule",
    "ExpertDtype",
    "Linear",
    "Places",
    "ResolvedBackend",
    "RowMap",
    "count_slots",
    "expert_ffn",
    "expert_ffn_loop",
    "from_buffers",
    "gather",
    "gather_sum",
    "grouped_mm",
    "keep_slots",
    "linear",
    "places_of",
    "resolve_backend",
    "rms_norm",
    "rotary_angles",
    "rotate",
    "router_gate",
    "sort_slots",
    "to_buffers",
    "top_k_ids",
    "tune_kernels",
    "uses_kernels",
]
