"""`k_profile.yaml`: how many experts each MoE layer of a trained model uses per token.

Written by `dmoe eval --budget`; read wherever a `--profile` is taken. By hand, `k: [4, 2, 1]` is
enough. Shape letter: L MoE layers.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dmoe.config import ConfigError, ConfigModel, load_config, save_config
from dmoe.models.config import ModelConfig

BudgetUnit = Literal["experts", "flops", "latency"]


class Budget(ConfigModel):
    """What a profile was allowed to cost, and what it does cost."""

    unit: BudgetUnit = "experts"
    """"experts": sum over the MoE layers of the experts per token; "flops": forward FLOPs a token;
    "latency": seconds of a forward pass of one micro-batch of the sample."""
    size: PositiveFloat
    """The most that it was allowed to cost, in that unit."""
    cost: PositiveFloat
    """What it costs, in that unit."""


class SearchedOn(ConfigModel):
    """The model and the text that a profile was chosen for."""

    checkpoint: str
    """Folder of the weights."""
    step: NonNegativeInt
    """Training step of the weights."""
    num_targets: PositiveInt
    """Predicted tokens of the sample, which is training text."""
    loss: float
    """Cross-entropy on the sample with the profile; nats a token."""


class KProfile(ConfigModel):
    """A number of experts per token for each MoE layer, and where it comes from."""

    k: tuple[PositiveInt, ...] = Field(min_length=1)
    """(L,) experts per token, first MoE layer first."""
    budget: Budget | None = None
    """What it may cost; null in a profile by hand."""
    searched_on: SearchedOn | None = None
    """What it was chosen for; null in a profile by hand."""

    def save(self, path: str | Path) -> None:
        """Write a file that `load_k_profile` reads back to an equal profile."""
        save_config(self, path)


def load_k_profile(path: str | Path, model: ModelConfig) -> KProfile:
    """Read a profile for a model.

    Raises:
        ConfigError: there is no such file, it is no profile, or it does not fit the model.
    """
    profile = load_config(path, schema=KProfile)
    try:
        model.k_of_layers(profile.k)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return profile
