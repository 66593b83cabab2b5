"""What experts that multiply in eight bits ask of the rest of `model.moe`."""

from typing import TYPE_CHECKING

from dmoe.config.base import ConfigError

if TYPE_CHECKING:  # the section that is checked
    from dmoe.moe.config import MoEConfig


def check_eight_bits(moe: "MoEConfig") -> None:
    """Check the width of experts, and that their products are those that have eight bits.

    Raises:
        ConfigError: `expert_dtype` does not go with another key.
    """
    if moe.expert_dtype == "same" or not moe.num_shards:
        return
    width, of_expert = moe.expert_width, "expert_ffn_dim"
    if moe.infinite is not None and moe.infinite.block_size is not None:
        of_expert = "infinite.block_size"
    for key, holds, reason in (
        (of_expert, width % 128, f"{of_expert} = {width} is no multiple of 128: change it"),
        (
            "backend",
            moe.backend == "megablocks",
            "backend = megablocks multiplies bfloat16: choose triton, torch or loop",
        ),
        (
            "expert_dropout",
            moe.expert_dropout,
            f"expert_dropout = {moe.expert_dropout:g} has products of its own: leave it out",
        ),
    ):
        if holds:
            raise ConfigError(
                f"expert_dtype = {moe.expert_dtype} does not go with this: {reason}, or set "
                f"expert_dtype to same",
                key=key,
            )
