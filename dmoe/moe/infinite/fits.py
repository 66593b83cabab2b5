"""Checks of `model.moe.infinite` against the rest of `model.moe`, before anything is built."""

from typing import TYPE_CHECKING

from dmoe.config.base import ConfigError
from dmoe.moe.infinite.config import InfiniteConfig, num_active

if TYPE_CHECKING:  # the section that holds this one
    from dmoe.moe.config import MoEConfig


def check_infinite(infinite: InfiniteConfig, moe: "MoEConfig") -> None:
    """Check that the space has a width, that every mask keeps something, and that no key is idle.

    Raises:
        ConfigError: it does not; the message has the numbers.
    """
    _check_width(infinite, moe)
    is_block = infinite.granularity == "block"
    num = moe.experts if is_block else moe.space_width
    for fraction in infinite.fractions:
        if num_active(fraction, num) < 1:
            what = f"blocks of {moe.expert_width} neurons" if is_block else "neurons"
            raise ConfigError(
                f"infinite.active_fraction keeps {fraction:g} of {num} {what}, which is "
                f"{fraction * num:.2g} and rounds to none: it must be at least {0.5 / num:g}",
                key="infinite.active_fraction",
            )
    if moe.elastic is not None:
        raise ConfigError(
            f"elastic draws from {moe.elastic.k_min} to {moe.elastic.k_max} experts, but a "
            f"continuous space has samples: leave elastic out; infinite.samples and "
            f"infinite.inference_samples say how many",
            key="elastic",
        )
    if is_block:
        return
    for key, given in (
        ("capacity", moe.capacity and f"factor {moe.capacity.factor}"),
        ("num_shared_experts", moe.num_shared_experts),
        ("expert_dropout", moe.expert_dropout),
        ("recompute_experts", moe.recompute_experts),
        ("dispatch_dtype", moe.dispatch_dtype != "same" and moe.dispatch_dtype),
        ("expert_dtype", moe.expert_dtype != "same" and moe.expert_dtype),
        ("backend", moe.backend == "megablocks" and moe.backend),
        ("losses", ", ".join(f"{n} {w}" for n, w in moe.losses.weights().items())),
    ):
        if given:
            raise ConfigError(
                f"{key} ({given}) is for experts that tokens are sent to, but "
                f"infinite.granularity = neuron is one network: leave {key} out, or set "
                f"infinite.granularity to block",
                key=key,
            )


def _check_width(infinite: InfiniteConfig, moe: "MoEConfig") -> None:
    if infinite.ffn_dim is None and None in (moe.num_experts, moe.expert_ffn_dim):
        raise ConfigError(
            f"infinite.ffn_dim is missing, and num_experts = {moe.num_experts} x expert_ffn_dim = "
            f"{moe.expert_ffn_dim} cannot stand in for it: give the width of the expert space",
            key="infinite.ffn_dim",
        )
    width = moe.space_width
    if infinite.granularity == "neuron":
        if width % 8:
            raise ConfigError(
                f"infinite.ffn_dim = {width} is not a multiple of 8, and the masks of 8 neurons "
                f"are kept in a byte: change it",
                key="infinite.ffn_dim",
            )
        return
    if infinite.block_size is None and moe.expert_ffn_dim is None:
        raise ConfigError(
            f"infinite.block_size is missing: give the neurons of a block, a divisor of "
            f"infinite.ffn_dim = {width}",
            key="infinite.block_size",
        )
    if width % moe.expert_width:
        raise ConfigError(
            f"infinite.block_size = {moe.expert_width} does not divide infinite.ffn_dim = {width} "
            f"into whole blocks: change either",
            key="infinite.block_size",
        )
