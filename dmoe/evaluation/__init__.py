"""Measures a model on text, and chooses its experts per token by what it measures."""

from dmoe.evaluation.agreement import router_agreement
from dmoe.evaluation.budget import FoundProfile, calibration_batches, search_profile
from dmoe.evaluation.perplexity import EvalResult, evaluate, evaluate_split
from dmoe.evaluation.similarity import expert_similarity

__all__ = [
    "EvalResult",
    "FoundProfile",
    "calibration_batches",
    "evaluate",
    "evaluate_split",
    "expert_similarity",
    "router_agreement",
    "search_profile",
]
