"""Routers: `router(x_TD, context) -> Routing`. Each file has a config, a `build` and a module."""

from typing import Annotated

from pydantic import Field

from dmoe.moe.routers.base import Router, RouterGate
from dmoe.moe.routers.forced_balance import ForcedBalanceConfig, ForcedBalanceRouter
from dmoe.moe.routers.top_k import TopKConfig, TopKRouter
from dmoe.moe.routers.top_p import TopPConfig, TopPRouter

RouterConfig = Annotated[TopKConfig | TopPConfig | ForcedBalanceConfig, Field(discriminator="name")]

__all__ = [
    "ForcedBalanceConfig",
    "ForcedBalanceRouter",
    "Router",
    "RouterConfig",
    "RouterGate",
    "TopKConfig",
    "TopKRouter",
    "TopPConfig",
    "TopPRouter",
]
