"""Builds the engine that the configuration names."""

from typing import Any

from dmoe.engine.base import Engine, EngineConfig
from dmoe.engine.native import NativeEngine


def build_engine(config: EngineConfig, **parts: Any) -> Engine:
    """Build an engine on this rank; every rank must call.

    Args:
        config: the engine section.
        **parts: what `NativeEngine` takes: model, optim, dims, device, seed, recompute.

    Raises:
        ConfigError: the engine cannot run here.
    """
    if config.name == "native":
        return NativeEngine(config, **parts)
    # DeepSpeed takes seconds to import.
    from dmoe.engine.zero import DeepSpeedEngine

    return DeepSpeedEngine(config, **parts)
