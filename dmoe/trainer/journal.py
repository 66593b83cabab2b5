"""Where a run is written down: console, metrics.jsonl, TensorBoard, status.json; on rank 0."""

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from dmoe.config import config_tree, dump_yaml, flatten_tree, save_config
from dmoe.config.files import write_atomically
from dmoe.metrics import Console, JsonlWriter, TensorBoardWriter, tensorboard_scalars
from dmoe.metrics.moe_stats import relative_load
from dmoe.trainer.config import Config


class Journal:
    """Takes rows and messages; other ranks than 0 write nothing.

    Args:
        config: of the run, saved as config.yaml.
        rank: of this process.
        step: the step the run starts from; rows beyond it, of a process that died, are dropped.
    """

    def __init__(self, config: Config, *, rank: int, step: int):
        self.folder = config.run.folder
        self.forced_k = bool(config.eval.k)
        self.enabled = rank == 0
        self.console = Console(config.train.steps, enabled=self.enabled)
        self.jsonl: JsonlWriter | None = None
        self.tensorboard: TensorBoardWriter | None = None
        if not self.enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.folder / "config.yaml")
        self.jsonl = JsonlWriter(self.folder / "metrics.jsonl")
        self.jsonl.truncate_after(step)
        if config.metrics.tensorboard:
            log_dir = self.folder / "tensorboard"
            self.tensorboard = TensorBoardWriter(log_dir, purge_step=step + 1)
            tree = config_tree(config)
            self.tensorboard.text("config", dump_yaml(tree), step)
            self.hparams = flatten_tree(tree)

    def message(self, text: str) -> None:
        """Show a text on the console."""
        self.console.message(text)

    def row(self, row: dict[str, Any]) -> None:
        """Record a row of metrics everywhere."""
        if self.jsonl is not None:
            self.jsonl.write(row)
        if self.tensorboard is not None:
            # At the router's own number of experts evaluations are one curve, whatever it is.
            curves = {key: row[key] for key in row if key != "k" or self.forced_k}
            self.tensorboard.scalars(row["step"], tensorboard_scalars(curves))
            self.tensorboard.flush()
        self.console.row(row)

    def heatmap(self, step: int, counts_LE: Tensor) -> None:
        """Record the load of every expert as an image and as a distribution."""
        if self.tensorboard is not None:
            counts = counts_LE.numpy()
            self.tensorboard.heatmap(step, "moe/load", counts)
            self.tensorboard.histogram(step, "moe/relative_load", relative_load(counts))

    def status(self, state: str, step: int, **details: Any) -> None:
        """Say in status.json what the run is doing, for whoever watches it from outside."""
        if self.enabled:
            status = {"state": state, "step": step, "time": time.time(), **details}
            write_atomically(Path(self.folder / "status.json"), json.dumps(status) + "\n")

    def results(self, values: dict[str, float]) -> None:
        """Enter the run with its last values in TensorBoard's table of runs."""
        if self.tensorboard is not None:
            self.tensorboard.hparams(self.hparams, values)

    def close(self) -> None:
        """Close the files."""
        self.console.close()
        if self.jsonl is not None:
            self.jsonl.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
