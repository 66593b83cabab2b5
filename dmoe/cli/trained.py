"""Opens a trained run: its configuration first, so that bad options are refused before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from dmoe.checkpoint import LoadedModel, find_checkpoint, load_model
from dmoe.checkpoint.manifest import verify
from dmoe.config import ConfigError, config_tree, diff_trees, load_config
from dmoe.trainer.config import Config

GateThreshold = Annotated[
    float,
    typer.Option(
        "--threshold",
        help="Tokens skip chosen experts whose score is below this share of their largest.",
    ),
]


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint and the configuration of its run, before any tensor is read."""

    folder: Path
    """Of the checkpoint."""
    config: Config

    @property
    def run_folder(self) -> Path:
        """The folder of the run; that of the checkpoint's parent where it is in no run folder."""
        parent = self.folder.parent
        return parent.parent if parent.name == "checkpoints" else parent

    def load(self, gate_threshold: float = 0.0) -> LoadedModel:
        """Load the model in the precision it was trained in."""
        moe = self.config.model.moe
        if moe is not None and moe.warning:
            typer.echo(f"WARNING: {moe.warning}", err=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = load_model(self.folder, device=device)
        loaded.model.set_gate_threshold(gate_threshold)
        return loaded


def open_run(trained: Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Find a checkpoint and read its configuration, changed by overrides.

    Raises:
        ConfigError: there is no checkpoint, or an override changes what its weights are.
        CorruptCheckpointError: the configuration cannot be read because the checkpoint is damaged.
    """
    folder = find_checkpoint(trained)
    path = folder / "config.yaml"
    try:
        saved = load_config(path)
    except ConfigError:
        verify(folder)  # a damaged file is not the user's mistake
        raise
    config: Config = load_config(path, overrides)
    for key, old, new in diff_trees(config_tree(saved), config_tree(config)):
        if key.split(".")[0] in ("model", "engine"):
            raise ConfigError(
                f"{key} is {old} in {folder} and cannot be changed to {new} for a trained model: "
                f"leave {key} out; for the number of experts per token there is --k"
            )
    return TrainedRun(folder, config)
