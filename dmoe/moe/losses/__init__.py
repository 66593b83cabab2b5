"""Auxiliary losses: pure functions of a routing, normalised by the sizes of the global batch."""

from pydantic import NonNegativeFloat, model_validator

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.losses.load_balance import BalanceChoices, BalanceScope, load_balance_loss
from dmoe.moe.losses.z_loss import z_loss


class LossesConfig(ConfigModel):
    """Weights of the auxiliary losses of a layer; the layers' losses are summed."""

    load_balance_weight: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss, which is 1 at perfect balance."""
    load_balance_scope: BalanceScope = "global_batch"
    """The set of tokens to balance over. "global_batch" costs one small all-reduce a layer, and
    with gradient accumulation one forward pass more, in which the slots of the step are counted. A
    number is that of consecutive tokens of a micro-batch, the local groups of GShard."""
    load_balance_choices: BalanceChoices = "all"
    """Whether the load is that of all choices of a token, or of its first (GShard)."""
    z_loss_weight: NonNegativeFloat = 0.0
    """Weight of the router z-loss (ST-MoE: 0.001)."""

    @model_validator(mode="after")
    def _first_choices_are_counted(self) -> "LossesConfig":
        if self.load_balance_choices == "first" and self.load_balance_scope == "global_batch":
            raise ConfigError(
                "load_balance_choices = first, but over load_balance_scope = global_batch all "
                "choices are counted: choose another scope, or load_balance_choices: all",
                key="load_balance_choices",
            )
        return self

    def weights(self) -> dict[str, float]:
        """Return the weight of each auxiliary loss in the training loss, without the zeros."""
        weights = {"load_balance": self.load_balance_weight, "z": self.z_loss_weight}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def needs_global_counts(self) -> bool:
        """Whether a loss depends on the slots that each expert has in the whole global batch."""
        return bool(self.load_balance_weight) and self.load_balance_scope == "global_batch"


__all__ = ["BalanceChoices", "BalanceScope", "LossesConfig", "load_balance_loss", "z_loss"]
