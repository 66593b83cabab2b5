"""The arms of the language runs of `classics.py`: overrides of `classics.yaml`, by group."""

from collections.abc import Sequence
from pathlib import Path

from dmoe.config import load_config
from dmoe.trainer.config import Config

BASE = Path(__file__).with_name("classics.yaml")
SEEDS = (0, 1, 2)

_SWITCH = ["model.moe.router={name: top_k, top_k: 1, normalize: false}"]


def _noisy(importance: float, load: float) -> list[str]:
    weights = f"importance_weight: {importance}, load_weight: {load}"
    return [f"model.moe.router={{name: noisy_top_k, top_k: 2, {weights}}}"]


def _capacity(factor: float) -> str:
    return f"model.moe.capacity={{factor: {factor}, minimum: 0}}"


PLAIN = "plain"
"""Top-1, dropless, float32, initial standard deviation 0.02: what the other top-1 arms vary."""
GRID = ((0, 0), (0.2, 0), (0, 0.2), (0.1, 0.1), (0.01, 0.01), (1, 1))
"""Weights of the importance and of the load loss, those of table 6 of arXiv 1701.06538."""
FACTORS = (0.5, 0.75, 1.0, 1.25, 2.0)
"""Capacity factors of a top-1 router."""

ARMS: dict[str, dict[str, list[str]]] = {
    "importance and load": {f"{i:g}, {m:g}": _noisy(i, m) for i, m in GRID},
    "top-1": {
        **{f"capacity {factor:g}": [*_SWITCH, _capacity(factor)] for factor in FACTORS},
        PLAIN: _SWITCH,
        "router in bfloat16": [f"{_SWITCH[0][:-1]}, precision: bf16}}"],
        "initial scale 1": [*_SWITCH, "model.init_scale=1.0"],
        "initial scale 0.1": [*_SWITCH, "model.init_scale=0.1"],
    },
}


def arm_config(group: str, arm: str, overrides: Sequence[str]) -> Config:
    """Return the configuration of an arm; `overrides` come last."""
    return load_config(BASE, [*ARMS[group][arm], *overrides])
