"""The only door to the kernels: one op a file, its slow twin beside it."""

from dmoe.ops.expert_ffn import Activation, expert_ffn, expert_ffn_loop
from dmoe.ops.grouped_mm import Backend, grouped_mm, resolve_backend
from dmoe.ops.rows import RowMap, gather, gather_sum

__all__ = [
    "Activation",
    "Backend",
    "RowMap",
    "expert_ffn",
    "expert_ffn_loop",
    "gather",
    "gather_sum",
    "grouped_mm",
    "resolve_backend",
]
