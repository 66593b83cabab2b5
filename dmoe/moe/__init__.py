"""Mixture-of-Experts layers: routers, capacity, dispatch, experts, losses."""

from dmoe.moe.base import SparseLayer
from dmoe.moe.config import MoEConfig
from dmoe.moe.layer import MoELayer
from dmoe.moe.routing import BatchTotals, MoEContext, Routing, Samples
from dmoe.moe.stats import MoEOutput, MoEStats

__all__ = [
    "BatchTotals",
    "MoEConfig",
    "MoEContext",
    "MoELayer",
    "MoEOutput",
    "MoEStats",
    "Routing",
    "Samples",
    "SparseLayer",
]
