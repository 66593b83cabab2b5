"""Elastic k: how many experts each MoE layer uses in each micro-batch of training.

Matryoshka MoE (arXiv 2509.26520) trains with a random number, so that one model runs with any. The
number is a pure function of seed, step, micro-batch and layer, so nothing has to be sent or saved.
Shapes: L MoE layers, K numbers from k_min to k_max, T tokens.
"""

from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.rng import numpy_generator, stream_key, token_uniform

Probability = Annotated[float, Field(ge=0, le=1)]
Array = NDArray[np.float64]

# The keys that belong to one distribution, and the distribution.
_PARAMETERS = {
    "temperature": "weighted",
    "probabilities": "explicit",
    "full_probability": "anchored",
}


class ElasticConfig(ConfigModel):
    """Trains with a random number of experts per token; at inference any number can be chosen."""

    k_min: PositiveInt = 1
    """Fewest experts per token. With 1 and normalised gates, a layer's gate is 1 whatever the
    router says, so the router gets no gradient from the language model wherever 1 is drawn."""
    k_max: PositiveInt
    """Most experts per token."""
    granularity: Literal["global_batch", "micro_batch", "layer", "token"] = "layer"
    """What draws a number of its own: a step; a micro-batch of a step; each layer in a micro-batch;
    or each token in each layer."""
    distribution: Literal["uniform", "weighted", "explicit", "anchored"] = "uniform"
    """How k is drawn from k_min to k_max: equally often; with P(k) proportional to
    k^(1 / temperature), which favours large k; with `probabilities`; or k_max with
    `full_probability` and else a smaller one, equally often."""
    temperature: PositiveFloat | None = None
    """Of "weighted"; null for 2 (M-MoE)."""
    probabilities: tuple[NonNegativeFloat, ...] | None = None
    """Of "explicit": one for each k from k_min to k_max; they sum to 1."""
    full_probability: Probability | None = None
    """Of "anchored": how often k is k_max; null for 0.8 (ERNIE 5.0)."""
    budget: PositiveInt | None = None
    """Sum of k over the MoE layers, the same in every micro-batch: a draw for each layer on the
    condition of that sum. Null to draw the layers independently."""
    normalize: bool | None = None
    """Divide a token's gates by their sum, in training and at inference; null to do as
    `router.normalize` says."""
    widen_steps: NonNegativeInt = 0
    """Steps in which the range widens: it begins with k_max alone, and its lower end falls linearly
    to k_min. 0 for the whole range from the start."""
    k_ideal: PositiveInt | None = None
    """Stochastic co-activation (EMoE, arXiv 2509.21892): in training the k experts of a token are a
    random subset of its `k_ideal` best, so that experts also work together that only a larger k at
    inference joins. Null for the k best."""

    @model_validator(mode="after")
    def _range_is_one(self) -> "ElasticConfig":
        if self.k_min > self.k_max:
            raise ConfigError(
                f"k_min = {self.k_min} is more than k_max = {self.k_max}: change either",
                key="k_min",
            )
        if self.k_ideal is not None and self.k_ideal < self.k_max:
            raise ConfigError(
                f"k_ideal = {self.k_ideal} is less than k_max = {self.k_max}, but the experts of a "
                f"token are drawn from its k_ideal best: raise it, or leave it out",
                key="k_ideal",
            )
        return self

    @model_validator(mode="after")
    def _parameters_belong_to_the_distribution(self) -> "ElasticConfig":
        for key, distribution in _PARAMETERS.items():
            if getattr(self, key) is not None and self.distribution != distribution:
                raise ConfigError(
                    f"{key} is given, but distribution = {self.distribution} does not use it: "
                    f"leave it out, or set distribution: {distribution}",
                    key=key,
                )
        if self.distribution != "explicit":
            return self
        num = self.k_max - self.k_min + 1
        given = self.probabilities or ()
        if len(given) != num or abs(sum(given) - 1) > 1e-6:
            raise ConfigError(
                f"distribution = explicit needs {num} probabilities that sum to 1, one for each k "
                f"from k_min = {self.k_min} to k_max = {self.k_max}, but probabilities = "
                f"{list(given)} has {len(given)} with the sum {sum(given):g}",
                key="probabilities",
            )
        if self.widen_steps and not given[-1]:
            raise ConfigError(
                f"widen_steps = {self.widen_steps} begins with k_max = {self.k_max} alone, which "
                f"has the probability 0: raise its probability, or set widen_steps to 0",
                key="widen_steps",
            )
        return self

    @model_validator(mode="after")
    def _budget_has_a_choice(self) -> "ElasticConfig":
        if self.budget is None:
            return self
        for key, wanted, reason in (
            ("granularity", "layer", "a budget is divided over layers that have a k of their own"),
            ("widen_steps", 0, "a range that is still narrow cannot sum to the budget"),
        ):
            if getattr(self, key) != wanted:
                raise ConfigError(
                    f"budget = {self.budget} with {key} = {getattr(self, key)}: {reason}; set "
                    f"{key} to {wanted}, or leave budget out",
                    key="budget",
                )
        if self.distribution == "anchored":
            raise ConfigError(
                f"budget = {self.budget} with distribution = anchored: a fixed sum leaves no room "
                f"for k_max with a probability of its own; leave budget out, or choose another "
                f"distribution",
                key="budget",
            )
        return self

    def check_layers(self, num_layers: int) -> None:
        """Check the budget against the number of MoE layers.

        Raises:
            ConfigError: no numbers from k_min to k_max that can be drawn have that sum.
        """
        if self.budget is None:
            return
        least, most = num_layers * self.k_min, num_layers * self.k_max
        if not least <= self.budget <= most:
            reason = (
                f"below {num_layers}, the number of MoE layers, of which each needs one: give "
                f"{least} to {most}"
                if self.budget < num_layers
                else f"not from {least} to {most}, the sums of k from k_min = {self.k_min} to "
                f"k_max = {self.k_max} over {num_layers} MoE layers"
            )
            raise ConfigError(f"budget = {self.budget} is {reason}", key="budget")
        if not _chances(self, num_layers)[0][self.budget]:
            raise ConfigError(
                f"budget = {self.budget} is no sum of {num_layers} numbers that have a probability "
                f"above 0 in probabilities = {list(self.probabilities or ())}",
                key="budget",
            )

    def lowest(self, step: int) -> int:
        """Return the lower end of the range at a step, counted from 0."""
        if step >= self.widen_steps:
            return self.k_min
        return self.k_max - (self.k_max - self.k_min) * step // self.widen_steps

    def chances(self, lowest: int) -> Array:
        """Return (K,) the probabilities of lowest, ..., k_max, where nothing is below `lowest`."""
        ks = np.arange(lowest, self.k_max + 1, dtype=np.float64)
        if self.distribution == "anchored":
            full = 0.8 if self.full_probability is None else self.full_probability
            full = full if len(ks) > 1 else 1.0
            return np.append(np.full(len(ks) - 1, (1 - full) / max(1, len(ks) - 1)), full)
        weights = np.ones_like(ks)
        if self.distribution == "weighted":
            weights = ks ** (1 / (2.0 if self.temperature is None else self.temperature))
        elif self.distribution == "explicit":
            weights = np.asarray(self.probabilities)[lowest - self.k_min :]
        return weights / weights.sum()

    def mean_k(self, num_layers: int) -> float:
        """Return the mean number of experts per token and layer, once the range is wide."""
        if self.budget is not None:
            return self.budget / num_layers
        ks = np.arange(self.k_min, self.k_max + 1)
        return float((ks * self.chances(self.k_min)).sum())


class ElasticK:
    """The numbers of experts of a run: f(seed, step, micro-batch, layer), the same on every layout.

    A micro-batch has its number in the step whichever rank computes it, so every rank can tell the
    draw of every micro-batch. Ranks that compute at the same time have different micro-batches, and
    so different draws; the all-to-all exchanges counts and does not mind.

    Args:
        config: the `model.moe.elastic` section.
        num_layers: MoE layers of the model.
        seed: of the run.
    """

    def __init__(self, config: ElasticConfig, *, num_layers: int, seed: int):
        self.config, self.num_layers, self.seed = config, num_layers, seed
        self._chances = None if config.budget is None else _chances(config, num_layers)

    def k(self, step: int, micro_batch: int, layer: int) -> int:
        """Return the experts per token of one layer; not for the granularity "token"."""
        return self.profile(step, micro_batch)[layer]

    def k_L(
        self, step: int, micro_batch: int, token_ids_T: Tensor
    ) -> tuple[int, ...] | tuple[Tensor, ...]:
        """Return the experts per token of each layer, as a `MoEContext` takes them.

        Args:
            step: number of the step, from 0.
            micro_batch: number of the micro-batch in its step, over all ranks.
            token_ids_T: (T,) int64 number of each token in the order of all training tokens.

        Returns:
            L numbers; for the granularity "token" L tensors, (T,) int64.
        """
        if self.config.granularity != "token":
            return self.profile(step, micro_batch)
        return tuple(self.k_of_tokens(step, layer, token_ids_T) for layer in range(self.num_layers))

    def profile(self, step: int, micro_batch: int) -> tuple[int, ...]:
        """Return the experts per token of each layer; not for the granularity "token"."""
        granularity, num_layers = self.config.granularity, self.num_layers
        assert granularity != "token", "each token has a number of its own"
        counters = (step,) if granularity == "global_batch" else (step, micro_batch)
        num_draws = num_layers if granularity == "layer" else 1
        uniform = numpy_generator(self.seed, "k", *counters).random(num_draws)
        if self._chances is not None:
            return self._with_sum(uniform)
        lowest = self.config.lowest(step)
        cumulative = _cumulative(self.config.chances(lowest))
        ks = [lowest + int(np.searchsorted(cumulative, u, side="right")) for u in uniform]
        return tuple(ks) if granularity == "layer" else tuple(ks) * num_layers

    def k_of_tokens(self, step: int, layer: int, token_ids_T: Tensor) -> Tensor:
        """Return (T,) int64 experts of each token in a layer, for the granularity "token"."""
        lowest = self.config.lowest(step)
        cumulative = torch.from_numpy(_cumulative(self.config.chances(lowest)))
        uniform_T1 = token_uniform(stream_key(self.seed, "k", step, layer), token_ids_T, 1)
        boundaries = cumulative.to(token_ids_T.device)
        return lowest + torch.bucketize(uniform_T1[:, 0].double(), boundaries, right=True)

    def _with_sum(self, uniform_L: Array) -> tuple[int, ...]:
        """Draw each layer's number given the sum that it leaves to the layers after it."""
        assert self._chances is not None
        assert self.config.budget is not None
        config, left = self.config, self.config.budget
        chances_K = config.chances(config.k_min)
        ks: list[int] = []
        for u, chance_of_rest in zip(uniform_L, self._chances[1:], strict=True):
            rests = left - np.arange(config.k_min, config.k_max + 1)
            reachable = np.where(rests >= 0, chance_of_rest[np.maximum(rests, 0)], 0.0)
            cumulative = _cumulative(chances_K * reachable)
            ks.append(config.k_min + int(np.searchsorted(cumulative, u, side="right")))
            left -= ks[-1]
        return tuple(ks)


def _cumulative(weights: Array) -> Array:
    """Return the running sum of weights over their sum: exactly 1 at the last that is above 0."""
    sums = weights.cumsum()
    return sums / sums[-1]


def _chances(config: ElasticConfig, num_layers: int) -> list[Array]:
    """Return for each l from 0 to L how likely layers l, l + 1, ... sum to 0, 1, ..., budget."""
    assert config.budget is not None
    of_one = np.concatenate([np.zeros(config.k_min), config.chances(config.k_min)])
    chances = [np.eye(1, config.budget + 1)[0]]
    for _ in range(num_layers):
        chances.append(np.convolve(chances[-1], of_one)[: config.budget + 1])
    return chances[::-1]
