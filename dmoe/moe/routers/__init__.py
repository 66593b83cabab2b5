"""Routers: `router(x_TD, context) -> Routing`. Each file has five headings, a config, a router."""

from dmoe.moe.routers.base import Router, RouterConfig, RouterGate, RouterSection
from dmoe.moe.routers.base_layer import BaseLayerConfig, BaseLayerRouter
from dmoe.moe.routers.batchwise import BatchwiseConfig, BatchwiseRouter
from dmoe.moe.routers.choice import top_k_routing
from dmoe.moe.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from dmoe.moe.routers.expert_threshold import ExpertThresholdConfig, ExpertThresholdRouter
from dmoe.moe.routers.forced_balance import ForcedBalanceConfig, ForcedBalanceRouter
from dmoe.moe.routers.hash import HashConfig, HashRouter
from dmoe.moe.routers.hierarchical import HierarchicalConfig, HierarchicalRouter
from dmoe.moe.routers.nested import NestedConfig, NestedRouter
from dmoe.moe.routers.noisy_top_k import NoisyTopKConfig, NoisyTopKRouter
from dmoe.moe.routers.product_key import PeerConfig
from dmoe.moe.routers.relu import ReluConfig, ReluRouter
from dmoe.moe.routers.sinkhorn import SinkhornConfig, SinkhornRouter
from dmoe.moe.routers.soft_gate import SoftGateConfig, SoftGateRouter
from dmoe.moe.routers.soft_slots import SoftMoEConfig
from dmoe.moe.routers.sparse_mixer import SparseMixerConfig, SparseMixerRouter
from dmoe.moe.routers.top_k import TopKConfig, TopKRouter
from dmoe.moe.routers.top_p import TopPConfig, TopPRouter

ROUTERS = (
    TopKConfig,
    TopPConfig,
    SparseMixerConfig,
    SoftGateConfig,
    ReluConfig,
    ExpertThresholdConfig,
    NoisyTopKConfig,
    HierarchicalConfig,
    BatchwiseConfig,
    BaseLayerConfig,
    SinkhornConfig,
    HashConfig,
    ExpertChoiceConfig,
    NestedConfig,
    SoftMoEConfig,
    PeerConfig,
    ForcedBalanceConfig,
)
"""The sections of the routers here; `RouterConfig` has those of plug-ins as well."""

__all__ = [
    "ROUTERS",
    "BaseLayerConfig",
    "BaseLayerRouter",
    "BatchwiseConfig",
    "BatchwiseRouter",
    "ExpertChoiceConfig",
    "ExpertChoiceRouter",
    "ExpertThresholdConfig",
    "ExpertThresholdRouter",
    "ForcedBalanceConfig",
    "ForcedBalanceRouter",
    "HashConfig",
    "HashRouter",
    "HierarchicalConfig",
    "HierarchicalRouter",
    "NestedConfig",
    "NestedRouter",
    "NoisyTopKConfig",
    "NoisyTopKRouter",
    "PeerConfig",
    "ReluConfig",
    "ReluRouter",
    "Router",
    "RouterConfig",
    "RouterGate",
    "RouterSection",
    "SinkhornConfig",
    "SinkhornRouter",
    "SoftGateConfig",
    "SoftGateRouter",
    "SoftMoEConfig",
    "SparseMixerConfig",
    "SparseMixerRouter",
    "TopKConfig",
    "TopKRouter",
    "TopPConfig",
    "TopPRouter",
    "top_k_routing",
]
