"""Checkpoints that are whole or absent, and that load on any number of ranks.

`manager` is what the trainer calls, `inspect` what commands call. Under them, `commit` publishes a
folder, `manifest` knows what belongs in it, `storage` writes the tensors, `metadata` the rest, and
`retention` says what is deleted.
"""

from dmoe.checkpoint.commit import find_checkpoint
from dmoe.checkpoint.inspect import CheckpointInfo, inspect_checkpoint, verify_checkpoint
from dmoe.checkpoint.manager import CheckpointConfig, CheckpointManager, load_checkpoint
from dmoe.checkpoint.manifest import CorruptCheckpointError, Problem
from dmoe.checkpoint.model import LoadedModel, load_model
from dmoe.checkpoint.ranks import CheckpointError

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointManager",
    "CorruptCheckpointError",
    "LoadedModel",
    "Problem",
    "find_checkpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_model",
    "verify_checkpoint",
]
