"""Measures a model on held-out text."""

from dmoe.evaluation.perplexity import EvalResult, evaluate, evaluate_split

__all__ = ["EvalResult", "evaluate", "evaluate_split"]
