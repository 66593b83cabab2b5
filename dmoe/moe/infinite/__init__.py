"""Infinity-MoE: a continuous space of experts, over single neurons or over blocks of them."""

from dmoe.moe.infinite.block import BlockRouter, InfiniteSection
from dmoe.moe.infinite.config import InfiniteConfig
from dmoe.moe.infinite.deep import DeepNeuronLayer
from dmoe.moe.infinite.fits import check_infinite
from dmoe.moe.infinite.initial import initial_std
from dmoe.moe.infinite.neuron import NeuronLayer

__all__ = [
    "BlockRouter",
    "DeepNeuronLayer",
    "InfiniteConfig",
    "InfiniteSection",
    "NeuronLayer",
    "check_infinite",
    "initial_std",
]
