"""Helpers for tests of dmoe and of programs that build on it."""

from dmoe.testing.distributed import run_distributed

__all__ = ["run_distributed"]
