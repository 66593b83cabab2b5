"""Processes, meshes, collectives with gradients, and which rank holds which expert."""

from dmoe.parallel.collectives import all_reduce_sum, all_to_all_rows
from dmoe.parallel.dims import ParallelConfig, ParallelDims
from dmoe.parallel.process import is_first_process, process_group, use_huge_pages

__all__ = [
    "ParallelConfig",
    "ParallelDims",
    "all_reduce_sum",
    "all_to_all_rows",
    "is_first_process",
    "process_group",
    "use_huge_pages",
]
