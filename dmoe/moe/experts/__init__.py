"""Experts: `experts(rows, counts_e) -> y_ND`, each source's rows times their gates, summed."""

from dmoe.moe.experts.feed_forward import FeedForward
from dmoe.moe.experts.grouped import GroupedExperts

__all__ = ["FeedForward", "GroupedExperts"]
