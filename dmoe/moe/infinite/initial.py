"""Initial weights and gains of infinity-MoE: its layers start at the scale of dense ones."""

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import nn

from dmoe.moe.infinite.config import InfiniteConfig, MixtureConfig


def init_latents(layer: nn.Module) -> None:
    """Give the weights of latents their size, for a layer that is used alone."""
    for name, parameter in layer.named_parameters():
        std = initial_std(name, parameter.shape)
        if std is not None:
            nn.init.normal_(parameter, std=std)


def initial_std(name: str, shape: torch.Size) -> float | None:
    """Return the standard deviation of an initial weight of a router or space; None for others.

    Inputs have a mean square of 1. Means then have variance 1, as sigma starts at 1, so z has
    variance 2, and the scores W_z z have variance 1.
    """
    if name.endswith("log_variance.weight"):
        return 0.0
    if name.endswith("w_z_FZ"):
        return (2 * shape[1]) ** -0.5
    if name.endswith((".mean.weight", ".hidden.weight")):
        return shape[1] ** -0.5
    if name.endswith(".choice.weight"):
        return 0.02
    return None


def gain(config: InfiniteConfig, fraction: float, *, at_mean: bool = False) -> float:
    """Return the factor that brings the root mean square of an initial mean mask to 1.

    The output then has the scale of the same network without a mask. At the start scores are
    standard normal, and those of two samples of a token correlate by 1/2, since mean and noise have
    equal variance; by 0 where the samples are of two components of a mixture.

    Args:
        config: the `model.moe.infinite` section.
        fraction: of active neurons.
        at_mean: the space gets the mean of z, without the noise, which halves the variance.
    """
    hard = config.is_hard
    components = config.router.components if isinstance(config.router, MixtureConfig) else 1
    square = mask_moment(fraction, 1.0, hard=hard)
    product = mask_moment(fraction, 0.5, hard=hard)
    product += (mask_moment(fraction, 0.0, hard=hard) - product) * (1 - 1 / components)
    if at_mean:
        return square**-0.5 if hard else (square / 2) ** -0.5
    return ((square + (config.samples - 1) * product) / config.samples) ** -0.5


def mask_moment(fraction: float, correlation: float, *, hard: bool) -> float:
    """Return E[m m'] of one neuron's values in two masks whose scores s, s' are standard normal.

    A mask is on where s is above the quantile t that leaves `fraction` above it, and is then s, or
    1 if hard. An integral over s of what m' is expected to be.
    """
    normal = NormalDist()
    threshold = normal.inv_cdf(1 - fraction) if fraction < 1 else -8.0
    deviation = (1 - correlation**2) ** 0.5

    def value(s: float) -> float:
        return 1.0 if hard else s

    def expected(s: float) -> float:
        if not deviation:
            return value(s)
        mean = correlation * s
        above = normal.cdf((mean - threshold) / deviation)
        if hard:
            return above
        return mean * above + deviation * normal.pdf((threshold - mean) / deviation)

    return _integral(lambda s: value(s) * expected(s) * normal.pdf(s), threshold)


def _integral(f: Callable[[float], float], start: float) -> float:
    """Return the integral from `start` to 8 by the midpoint rule."""
    num = 4000
    width = (8 - start) / num
    return width * sum(f(start + (i + 0.5) * width) for i in range(num))
