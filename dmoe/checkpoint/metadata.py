"""The two documents beside the tensors: metadata.json for resuming and config.yaml for people.

Written and read by manager; both are covered by the manifest.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dmoe.checkpoint.manifest import CorruptCheckpointError
from dmoe.checkpoint.ranks import CheckpointError
from dmoe.config import dump_yaml

METADATA = "metadata.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint holds beside tensors."""

    step: int
    eval_loss: float | None
    """In nats a token, if the step was evaluated; decides which checkpoint is best."""
    parts: dict[str, Any]
    """JSON of each part without tensors (schedule, data, rng, progress, ...), by name."""


def encode_documents(metadata: Metadata, config_tree: dict[str, Any]) -> dict[str, bytes]:
    """Return the content of the two files by name.

    Raises:
        CheckpointError: a value that JSON or YAML cannot give back equal, such as NaN or a tensor.
    """
    try:
        text = json.dumps(asdict(metadata), indent=1, allow_nan=False)
        config = dump_yaml(config_tree)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"state that cannot be saved as JSON or YAML: {error}") from error
    return {METADATA: text.encode(), CONFIG: config.encode()}


def read_metadata(folder: Path) -> Metadata:
    """Read metadata.json of a checkpoint.

    Raises:
        CorruptCheckpointError: the file is missing or not what `encode_documents` wrote.
    """
    path = folder / METADATA
    try:
        return Metadata(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error
