"""The arms of the infinity-MoE experiment: what each puts in the place of the feed-forward part.

All have the parameters of the `neuron` arm, its space and router included: the same total, and
where they are sparse about the same active ones. Called by `infinite.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmoe.config import load_config
from dmoe.moe import Samples
from dmoe.trainer.config import Config

BASE = Path(__file__).with_name("infinite.yaml")
SAMPLES: tuple[Samples, ...] = (1, 2, 4, 8, "mean")
"""Where continuous experts are measured: numbers of samples at inference, and z = mean."""
TRAINED_SAMPLES = 2
FEW_SAMPLES: tuple[Samples, ...] = (TRAINED_SAMPLES, "mean")
"""Where the arms of the other questions are."""
LATENT_DIM = 16
"""d_z of all arms but those of the sweep."""
SWEPT_DIMS = (4, 8, 16, 32, 64, 128)

Group = Literal["compared", "latent_dim", "router", "deep"]
"""Which question an arm is for."""


@dataclass(frozen=True)
class Arm:
    """One model."""

    title: str
    group: Group
    overrides: tuple[str, ...]


def _dense(title: str, ffn_dim: int) -> Arm:
    return Arm(title, "compared", (f"model.ffn_dim={ffn_dim}",))


def _top_k(title: str, num_experts: int, width: int, router: str) -> Arm:
    # The loop takes any width.
    moe = f"num_experts: {num_experts}, expert_ffn_dim: {width}, backend: loop, router: {router}"
    return Arm(title, "compared", (f"model.moe={{{moe}}}",))


def _infinite(title: str, group: Group, *, latent_dim: int = LATENT_DIM, keys: str = "") -> Arm:
    space = f"samples: {TRAINED_SAMPLES}, active_fraction: 0.25, latent_dim: {latent_dim}"
    keys = keys or "granularity: neuron, ffn_dim: 736"
    return Arm(title, group, (f"model.moe.infinite={{{space}, {keys}}}",))


def _deep(title: str, keys: str, width: int = 296) -> Arm:
    # Two layers of 296 neurons have as many parameters as one of 736; with a router each, of 288.
    return _infinite(title, "deep", keys=f"ffn_dim: {width}, deep: {{layers: 2, {keys}}}")


ARMS = {
    "dense_active": _dense("dense, as wide as the active neurons", 409),
    "dense_total": _dense("dense, as wide as all neurons", 777),
    "switch": _top_k("Switch, top-1 of 2", 2, 388, "{name: top_k, top_k: 1, normalize: false}"),
    "top2": _top_k("MoE, top-2 of 4", 4, 194, "{name: top_k, top_k: 2}"),
    "neuron": _infinite("infinity-MoE, neuron", "compared"),
    "block": _infinite(
        "infinity-MoE, block of 32",
        "compared",
        keys="granularity: block, ffn_dim: 768, block_size: 32",
    ),
    "mixture": _infinite(
        "mixture of 4 Gaussians",
        "router",
        keys="ffn_dim: 736, router: {name: mixture, components: 4, mean: argmax}",
    ),
    "deep_shared": _deep("2 layers, shared z", "latent: shared"),
    "deep_independent": _deep("2 layers, a z each", "latent: independent", width=288),
    "deep_hierarchical": _deep("2 layers, z from z", "latent: hierarchical"),
    "deep_mean": _deep("2 layers, shared, mean in the second", "mean_after_first: true"),
    **{
        f"dim{dim}": _infinite(f"d_z = {dim}", "latent_dim", latent_dim=dim)
        for dim in SWEPT_DIMS
        if dim != LATENT_DIM
    },
}

SWEEP_ARMS = {dim: "neuron" if dim == LATENT_DIM else f"dim{dim}" for dim in SWEPT_DIMS}
"""The arm of each d_z."""


def arms_of(group: Group) -> list[str]:
    """Return the arms that are for a question."""
    return [name for name, arm in ARMS.items() if arm.group == group]


def arm_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of an arm, with overrides that hold for all arms."""
    return load_config(BASE, [*ARMS[name].overrides, *overrides], Config)
