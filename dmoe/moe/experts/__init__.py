"""Experts: `experts(rows, counts_e) -> y_RD`, rows sorted by local expert, gates applied."""

from dmoe.moe.experts.feed_forward import FeedForward
from dmoe.moe.experts.grouped import GroupedExperts

__all__ = ["FeedForward", "GroupedExperts"]
