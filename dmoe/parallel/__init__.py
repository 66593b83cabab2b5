"""Processes, meshes, collectives with gradients, and which rank holds which expert."""

from dmoe.parallel.collectives import all_reduce_sum, all_to_all_rows
from dmoe.parallel.dims import ParallelConfig, ParallelDims
from dmoe.parallel.process import is_first_process, process_group, tune_host_memory

__all__ = [
    "ParallelConfig",
    "ParallelDims",
    "all_reduce_sum",
    "all_to_all_rows",
    "is_first_process",
    "process_group",
    "tune_host_memory",
]
