"""One language run of `classics.py`: train an arm through the library and read what it wrote."""

import json
import shutil
import statistics
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from classics_arms import arm_config

from dmoe.parallel import process_group
from dmoe.trainer.build import open_run
from dmoe.trainer.callbacks import Evaluate, LogMetrics
from dmoe.trainer.summary import measure

AVERAGED = (
    "moe/load_cv_mean",
    "moe/load_max_over_mean_mean",
    "moe/drop_frac_mean",
    "moe/importance_loss",
    "moe/load_loss",
)
"""Metrics that are averaged over the last fifth of the steps, where they are there."""

Json = dict[str, Any]


def perform(group: str, arm: str, seed: int, out: Path, overrides: list[str]) -> Json:
    """Train one arm and return what was measured."""
    name = f"{group}-{arm}-{seed}".replace(" ", "_").replace(",", "")
    place = [f"run.dir={json.dumps(str(out / 'runs'))}", f"run.name={name}", f"run.seed={seed}"]
    config = arm_config(group, arm, [*overrides, *place])
    # What was cut off is begun anew: these runs are too short for checkpoints.
    shutil.rmtree(config.run.folder, ignore_errors=True)
    with (
        (out / "log.txt").open("a") as log,
        redirect_stdout(log),
        process_group() as device,
        open_run(config, device) as run,
    ):
        metrics = LogMetrics(config, run.journal, device=device, world_size=run.dims.world_size)
        evaluate = Evaluate(config, run.journal, partial(measure, run))
        run.trainer.fit([metrics, evaluate])
    rows = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").open()]
    steps, held_out = ([row for row in rows if key in row] for key in ("loss", "eval_loss"))
    last = [row for row in steps if row["step"] > 0.8 * config.train.steps]
    return {
        "group": group,
        "arm": arm,
        "seed": seed,
        "steps": config.train.steps,
        "tokens": steps[-1]["tokens"],
        "loss": held_out[-1]["eval_loss"],
        "early_loss": held_out[0]["eval_loss"],
        "early_step": held_out[0]["step"],
        **{key: statistics.fmean(r[key] for r in last) for key in AVERAGED if key in last[0]},
    }
