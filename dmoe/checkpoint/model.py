"""A trained model out of a checkpoint, in one process: `load_model(path)`.

Called by `dmoe eval` and `dmoe generate`, and by anyone's own program.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dmoe.checkpoint.commit import find_checkpoint
from dmoe.checkpoint.manifest import verify
from dmoe.checkpoint.metadata import read_metadata
from dmoe.checkpoint.storage import load_tensors
from dmoe.models import DecoderLM, ModelConfig, build_model
from dmoe.models.precision import COMPUTE_DTYPES


class LoadedModel(NamedTuple):
    """A model and what its checkpoint says of it."""

    model: DecoderLM
    """In evaluation mode."""
    config: dict[str, Any]
    """The whole configuration of the run, as plain data."""
    step: int
    """Training step of the weights."""
    path: Path
    """The checkpoint folder."""


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Verify a checkpoint and load its model, whatever layout it was trained on.

    Args:
        path: a checkpoint folder, or a run folder, of which the latest checkpoint is taken.
        device: where the model is to be.
        compute_dtype: of activations and products; None for that of the run.

    Raises:
        ConfigError: there is no checkpoint at `path`.
        CorruptCheckpointError: it is damaged; the message names the file.
    """
    folder = find_checkpoint(Path(path))
    # First of all, so that nothing below believes a damaged file.
    verify(folder)
    metadata = read_metadata(folder)
    config: dict[str, Any] = metadata.parts["config"]
    model = build_model(
        ModelConfig.model_validate(config["model"]),
        device="meta",
        compute_dtype=compute_dtype or COMPUTE_DTYPES[config["engine"]["precision"]],
    )
    model.to_empty(device=device)
    load_tensors({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, folder)
    return LoadedModel(model.eval(), config, metadata.step, folder)
