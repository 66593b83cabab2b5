"""`dmoe eval --budget`: the search for a profile, checked before and written down after."""

from dataclasses import dataclass
from pathlib import Path

from dmoe.checkpoint import LoadedModel
from dmoe.cli.trained import TrainedRun
from dmoe.config import ConfigError
from dmoe.data import build_train_dataset
from dmoe.evaluation import calibration_batches, search_profile
from dmoe.evaluation.costs import Costs, expert_costs, flop_costs, latency_costs
from dmoe.models import ModelConfig
from dmoe.models.k_profile import Budget, BudgetUnit, KProfile, SearchedOn


@dataclass(frozen=True)
class Search:
    """What is to be searched, and where the result goes."""

    run: TrainedRun
    budget: float
    unit: BudgetUnit
    k_max: int
    num_swaps: int
    num_batches: int
    """Micro-batches of training text."""
    output: Path

    def __post_init__(self) -> None:
        """Refuse what cannot be searched.

        Raises:
            ConfigError: the model has no choice of k, the budget leaves none, or there is no folder
                for the result.
        """
        self.run.config.model.k_of_layers(self.k_max)
        if not self.output.parent.is_dir():
            raise ConfigError(f"--output {self.output}: there is no folder {self.output.parent}")
        if self.unit == "latency":  # what it can be is measured first
            if not self.budget > 0:
                raise ConfigError(f"--budget {self.budget} is no number of seconds above 0")
        else:
            self._counted().check(self.budget)

    def __call__(self, loaded: LoadedModel) -> tuple[KProfile, dict[str, object]]:
        """Search, write the profile, and return it with what is to be said of it."""
        config = self.run.config
        dataset = build_train_dataset(
            config.data,
            seq_len=config.train.seq_len,
            vocab_size=config.model.vocab_size,
            seed=config.run.seed,
        )
        batches = calibration_batches(dataset, self.num_batches, config.train.micro_batch_size)
        if self.unit == "latency":
            costs = latency_costs(loaded.model, batches[0], self.k_max)
        else:
            costs = self._counted()
        found = search_profile(loaded.model, batches, costs, self.budget, num_swaps=self.num_swaps)
        profile = KProfile(
            k=found.k_L,
            budget=Budget(unit=self.unit, size=self.budget, cost=found.cost),
            searched_on=SearchedOn(
                checkpoint=str(self.run.folder),
                step=loaded.step,
                num_targets=found.num_targets,
                loss=found.loss,
            ),
        )
        profile.save(self.output)
        return profile, {
            "budget": _whole(self.budget),
            "budget_unit": self.unit,
            "cost": _whole(found.cost),
            "calibration_loss": found.loss,
            "uniform_k": found.uniform_k,
            "uniform_calibration_loss": found.uniform_loss,
            "profile": str(self.output),
        }

    def _counted(self) -> Costs:
        config = self.run.config
        if self.unit == "experts":
            return expert_costs(config.model, self.k_max)
        return flop_costs(config.model, self.k_max, seq_len=config.train.seq_len)


def default_k_max(model: ModelConfig) -> int:
    """Return the most experts per token that a layer had in training.

    Raises:
        ConfigError: it is dense.
    """
    if model.moe is None:
        raise ConfigError("--budget divides experts over layers, but the model is dense")
    return model.moe.most_k


def _whole(number: float) -> float:
    """Return a whole number as one, to be printed without a point."""
    return int(number) if number.is_integer() else number
