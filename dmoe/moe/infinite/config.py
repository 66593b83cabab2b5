"""The `model.moe.infinite` section: a continuous space of experts (infinity-MoE, arXiv 2601.17680).

An expert is a point z of a latent space; it is the network whose neurons are those that score
highest at z. Shapes: Z latent dim, F neurons.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.moe.routing import MoEContext


class _NormalConfig(ConfigModel):
    """What normal distributions of a token have in common."""

    hidden_dim: PositiveInt | None = None
    """Width of a hidden layer before mean and log-variance; null for linear maps of the token."""
    log_variance_min: float = -8.0
    """The log-variance is clamped to at least this."""
    log_variance_max: float = 4.0
    """And to at most this."""

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.log_variance_min >= self.log_variance_max:
            raise ConfigError(
                f"log_variance_min = {self.log_variance_min} is not below log_variance_max = "
                f"{self.log_variance_max}: change either",
                key="log_variance_min",
            )
        return self


class GaussianConfig(_NormalConfig):
    """A token's experts are drawn from a normal distribution of its own."""

    name: Literal["gaussian"] = "gaussian"
    """One normal distribution with a diagonal covariance."""


class MixtureConfig(_NormalConfig):
    """A token's experts are drawn from a mixture of normal distributions of its own."""

    name: Literal["mixture"]
    """Several normal distributions; each sample chooses one of them at random, by Gumbel-softmax
    with a straight-through gradient (arXiv 1611.01144)."""
    components: PositiveInt = 4
    """Normal distributions of a token."""
    temperature: PositiveFloat = 1.0
    """Of the softmax that gives the choice its gradient."""
    mean: Literal["argmax", "average"] | None = None
    """What the mean of a mixture is, where one is asked for: the mean of the likeliest component,
    or the average of all means by their probabilities."""


LatentConfig = Annotated[GaussianConfig | MixtureConfig, Field(discriminator="name")]


class DeepConfig(ConfigModel):
    """Several masked layers of neurons inside one network; every one but the first reads the
    layer of neurons before it, brought to a mean square of 1."""

    layers: PositiveInt = 2
    """Masked layers, each as wide as the expert space."""
    latent: Literal["shared", "independent", "hierarchical"] = "shared"
    """Where a layer's z comes from: one for all layers; one for each, drawn from the token; or one
    for each, drawn from the z of the layer before."""
    fractions: tuple[float, ...] | None = None
    """Active fraction of each layer; null for active_fraction^(1 / layers) in all of them, so that
    their product is `active_fraction`."""
    mean_after_first: bool = False
    """Layers after the first take the mean of their z instead of a sample."""


class InfiniteConfig(ConfigModel):
    """A continuous space of experts in place of a number of them."""

    granularity: Literal["neuron", "block"] = "neuron"
    """What a mask switches: "neuron" single neurons, as in the paper, computed as one dense network
    under the mean mask; "block" blocks of neurons, each of which is then an expert of its own for
    dispatch, grouped GEMM and expert parallelism."""
    ffn_dim: PositiveInt | None = None
    """Neurons of the expert space; null for num_experts x expert_ffn_dim."""
    block_size: PositiveInt | None = None
    """Neurons of a block; null for expert_ffn_dim. For granularity block alone."""
    latent_dim: PositiveInt = 64
    """Width of z."""
    samples: PositiveInt = 2
    """Experts drawn for a token in training, and at inference unless said otherwise."""
    inference_samples: PositiveInt | None = None
    """Experts drawn for a token at inference; null for `samples`."""
    inference: Literal["sample", "mean"] = "sample"
    """At inference take samples, as in the paper, or the mean of z alone."""
    active_fraction: float = Field(default=0.25, gt=0, le=1)
    """Neurons or blocks that one expert has, as a fraction of all."""
    mask: Literal["soft", "hard"] = "soft"
    """Active neurons are multiplied by their score (soft), or by 1 with the gradient of the score
    (hard, straight-through)."""
    mask_position: Literal["after_activation", "pre_activation"] = "after_activation"
    """What the mask multiplies: activations, or what goes into the activation function (gates,
    where there are gates)."""
    router: LatentConfig = Field(default_factory=GaussianConfig)
    """The distribution that z is drawn from."""
    deep: DeepConfig | None = None
    """Several masked layers; null for one. For granularity neuron alone."""

    @model_validator(mode="after")
    def _choices_agree(self) -> "InfiniteConfig":
        if self.inference == "mean":
            self.check_mean("inference = mean")
        if self.deep is not None and self.deep.mean_after_first:
            self.check_mean("deep.mean_after_first")
        if self.inference == "mean" and self.inference_samples:
            raise ConfigError(
                f"inference_samples = {self.inference_samples}, but inference = mean takes no "
                f"samples: leave either out",
                key="inference_samples",
            )
        if self.granularity == "neuron":
            self._check_neurons()
        else:
            self._check_blocks()
        return self

    def check_mean(self, asked_by: str) -> None:
        """Check that z has one mean, or that a rule makes one of several.

        Args:
            asked_by: what takes the mean, for the message.

        Raises:
            ConfigError: there are several, and no rule.
        """
        router = self.router
        if isinstance(router, MixtureConfig) and router.mean is None:
            raise ConfigError(
                f"{asked_by} takes the mean of z, but router.name = mixture has "
                f"router.components = {router.components} of them: set router.mean to argmax or "
                f"average",
                key="router.mean",
            )

    def _check_neurons(self) -> None:
        if self.block_size is not None:
            raise ConfigError(
                f"block_size = {self.block_size}, but granularity = neuron has no blocks: leave it "
                f"out, or set granularity to block",
                key="block_size",
            )
        deep = self.deep
        if deep is None:
            return
        if self.mask_position == "pre_activation":
            raise ConfigError(
                f"mask_position = pre_activation, but the deep.layers = {deep.layers} layers are "
                f"masked after their activation: set mask_position to after_activation",
                key="mask_position",
            )
        fractions = deep.fractions or ()
        if deep.fractions is not None and len(fractions) != deep.layers:
            raise ConfigError(
                f"deep.fractions = {list(fractions)} has {len(fractions)} numbers for deep.layers "
                f"= {deep.layers}: give one a layer",
                key="deep.fractions",
            )
        for fraction in fractions:
            if not 0 < fraction <= 1:
                raise ConfigError(
                    f"deep.fractions holds {fraction}, which is not above 0 and at most 1",
                    key="deep.fractions",
                )

    def _check_blocks(self) -> None:
        if self.mask_position == "pre_activation":
            raise ConfigError(
                "mask_position = pre_activation, but a block's weight multiplies its activations: "
                "set mask_position to after_activation, or granularity to neuron",
                key="mask_position",
            )
        if self.deep is not None:
            raise ConfigError(
                f"deep.layers = {self.deep.layers}, but granularity = block has one layer: leave "
                f"deep out, or set granularity to neuron",
                key="deep",
            )

    @property
    def fractions(self) -> tuple[float, ...]:
        """Active fraction of each masked layer."""
        if self.deep is None:
            return (self.active_fraction,)
        if self.deep.fractions is not None:
            return self.deep.fractions
        return (self.active_fraction ** (1 / self.deep.layers),) * self.deep.layers

    @property
    def is_hard(self) -> bool:
        """Whether active neurons are at 1."""
        return self.mask == "hard"

    def num_samples(self, context: MoEContext) -> int:
        """Return the experts drawn for a token; 0 where the mean of z is taken instead."""
        if context.training:
            return self.samples
        samples = context.samples or (
            "mean" if self.inference == "mean" else self.inference_samples or self.samples
        )
        return 0 if samples == "mean" else samples


def num_active(fraction: float, num: int) -> int:
    """Return how many of `num` neurons or blocks a mask keeps: the nearest whole number."""
    return math.floor(fraction * num + 0.5)
