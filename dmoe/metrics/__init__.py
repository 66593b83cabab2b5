"""How a run is seen: console, metrics.jsonl, TensorBoard, and the numbers that go into them."""

from dmoe.metrics.console import Console
from dmoe.metrics.jsonl import JsonlWriter, read_metrics
from dmoe.metrics.moe_stats import moe_rows, statistics_within
from dmoe.metrics.names import METRICS, MOE_STATISTICS, tensorboard_scalars
from dmoe.metrics.tensorboard import TensorBoardWriter
from dmoe.metrics.throughput import Throughput, Window, peak_flops

__all__ = [
    "METRICS",
    "MOE_STATISTICS",
    "Console",
    "JsonlWriter",
    "TensorBoardWriter",
    "Throughput",
    "Window",
    "moe_rows",
    "peak_flops",
    "read_metrics",
    "statistics_within",
    "tensorboard_scalars",
]
