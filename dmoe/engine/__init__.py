"""Engines: one protocol for a training step, and its back ends."""

from dmoe.engine.base import Engine, EngineConfig, StepPosition, StepResult
from dmoe.engine.build import build_engine
from dmoe.engine.native import NativeEngine

__all__ = [
    "Engine",
    "EngineConfig",
    "NativeEngine",
    "StepPosition",
    "StepResult",
    "build_engine",
]
