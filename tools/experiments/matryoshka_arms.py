"""The arms of the Matryoshka experiment: what each changes in matryoshka.yaml, and for how long.

Matryoshka MoE (arXiv 2509.26520) trains with a number of experts k that varies, in [1, 6] there and
here. Its specialists are trained at one k. Called by `matryoshka.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmoe.config import load_config
from dmoe.models.counts import flops_per_token
from dmoe.trainer.config import Config

BASE = Path(__file__).with_name("matryoshka.yaml")
TRAINED_K = (1, 2, 4, 6)
"""There is a specialist for each."""
K_MAX = 6
"""Most experts a token in training; from 1 on."""
SWEEP = tuple(range(1, 9))
"""Where every arm is measured: the k of training, those between, and two above."""
REFERENCE = "layer"
"""The arm whose training FLOPs the second table gives to all."""

Match = Literal["tokens", "flops"]
"""What all arms have the same amount of in training."""


@dataclass(frozen=True)
class Arm:
    """One way to train the model."""

    title: str
    overrides: tuple[str, ...]


def _fixed(k: int, normalize: bool = True) -> Arm:
    title = f"fixed k = {k}" + ("" if normalize else ", plain softmax gate")
    router = f"model.moe.router={{name: top_k, top_k: {k}, normalize: {str(normalize).lower()}}}"
    return Arm(title, (router,))


def _elastic(title: str, keys: str) -> Arm:
    return Arm(title, (f"model.moe.elastic={{k_min: 1, k_max: {K_MAX}, {keys}}}",))


ARMS = {
    "k1": _fixed(1),
    "k1_plain": _fixed(1, normalize=False),
    "k2": _fixed(2),
    "k4": _fixed(4),
    "k6": _fixed(6),
    "global": _elastic("Matryoshka, global batch", "granularity: global_batch"),
    "micro": _elastic("Matryoshka, micro-batch", "granularity: micro_batch"),
    "layer": _elastic("Matryoshka, layer", "granularity: layer"),
    "weighted": _elastic("layer, weighted, tau = 2", "distribution: weighted, temperature: 2"),
    "anchored": _elastic(
        "layer, anchored, p = 0.8", "distribution: anchored, full_probability: 0.8"
    ),
    "top_p": Arm(
        "top-p, steered to mean k = 3.5",
        ("model.moe.router={name: top_p, p: 0.4, controller: {target_k: 3.5}}",),
    ),
}

SPECIALISTS = {1: ("k1", "k1_plain"), 2: ("k2",), 4: ("k4",), 6: ("k6",)}
"""Who a model at k is compared with: the better one where there are two."""


def arm_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of an arm, with overrides that hold for all arms."""
    return load_config(BASE, [*ARMS[name].overrides, *overrides], Config)


def training_flops(config: Config) -> float:
    """Return the floating-point operations of a token in training, at the mean k."""
    return flops_per_token(config.model, config.train.seq_len)


def steps_of(name: str, steps: int, match: Match, overrides: Sequence[str] = ()) -> int:
    """Return how many steps an arm makes where the reference makes `steps`."""
    if match == "tokens":
        return steps
    flops = {arm: training_flops(arm_config(arm, overrides)) for arm in (name, REFERENCE)}
    return round(steps * flops[REFERENCE] / flops[name])


def ramp(total: int, num_layers: int, *, front: bool) -> tuple[int, ...]:
    """Share `total` experts out over layers in proportion to L, L - 1, ..., 1, or the reverse.

    Each layer has 1 to `K_MAX`. The first has most where `front`, else the last. Shares are rounded
    by the method of Webster: the next expert goes where share / (k + 1/2) is largest.

    Raises:
        ValueError: no profile has that sum.
    """
    if not num_layers <= total <= num_layers * K_MAX:
        raise ValueError(f"{num_layers} layers of 1 to {K_MAX} experts cannot have {total} in all")
    k_L = [1] * num_layers
    for _ in range(total - num_layers):
        open_layers = [layer for layer in range(num_layers) if k_L[layer] < K_MAX]
        layer = max(open_layers, key=lambda layer: (num_layers - layer) / (k_L[layer] + 0.5))
        k_L[layer] += 1
    return tuple(k_L if front else reversed(k_L))
