"""Mixture-of-Experts layers: routers, capacity, dispatch, experts, losses."""

from dmoe.moe.layer import MoEConfig, MoELayer, MoEOutput
from dmoe.moe.routing import BatchTotals, MoEContext, Routing
from dmoe.moe.stats import MoEStats

__all__ = [
    "BatchTotals",
    "MoEConfig",
    "MoEContext",
    "MoELayer",
    "MoEOutput",
    "MoEStats",
    "Routing",
]
