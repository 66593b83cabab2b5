"""How fast the arms train: a step of each in turn, in one process. Called by `infinite.py`.

The layers alone are timed by tools/benchmarks/infinite_layer.py.
"""

import json
import sys
from datetime import date
from pathlib import Path

from experiment_step import training_step
from infinite_arms import ARMS, arm_config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from harness import Settings, machine, measure, prepare


def measure_speed(path: Path, settings: Settings) -> None:
    """Time a training step of every arm and write `path`, milliseconds of each round."""
    prepare(settings)
    configs = {arm: arm_config(arm) for arm in ARMS}
    train = configs["neuron"].train
    numbers = {
        "tokens": train.global_batch_size * train.seq_len,
        "ms": measure({arm: training_step(c) for arm, c in configs.items()}, settings),
        "settings": settings.describe(),
        "machine": machine(),
        "date": str(date.today()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1) + "\n")
