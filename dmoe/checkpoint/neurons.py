"""Turns a checkpoint of blocks of neurons into one of single neurons that computes the same.

Called by `dmoe checkpoint to-neurons`. Both are infinity-MoE (`model.moe.infinite`).
"""

import copy
from pathlib import Path
from typing import Any

from dmoe.checkpoint.commit import find_checkpoint
from dmoe.checkpoint.manager import CheckpointConfig, CheckpointManager
from dmoe.checkpoint.model import load_model
from dmoe.config.base import ConfigError
from dmoe.models import ModelConfig
from dmoe.moe.infinite.config import num_active
from dmoe.moe.infinite.convert import block_to_neuron


def convert_to_neurons(source: Path, run_folder: Path) -> Path:
    """Write the model of a checkpoint, read as one of single neurons, and return its folder.

    The new checkpoint holds the model alone, so it can be evaluated and used but not resumed.

    Args:
        source: a run folder or a checkpoint folder.
        run_folder: where a folder `checkpoints` is made.

    Raises:
        ConfigError: there is no checkpoint, its model has no blocks, or has what single neurons
            cannot have; or `run_folder` holds checkpoints.
        CorruptCheckpointError: the checkpoint is damaged.
    """
    root = run_folder / "checkpoints"
    if root.exists():
        raise ConfigError(f"{root} is there already: choose another folder")
    loaded = load_model(source)
    tree = neuron_config(loaded.config)
    moe = loaded.model.config.moe
    assert moe is not None
    state = block_to_neuron(
        loaded.model.state_dict(),
        block_size=moe.expert_width,
        gated=loaded.model.config.activation == "swiglu",
    )
    manager = CheckpointManager(root, CheckpointConfig())
    try:
        tensors = {f"model.{name}": tensor for name, tensor in state.items()}
        manager.save(loaded.step, tensors, {"config": tree}, tree, block=True)
    finally:
        manager.close()
    return find_checkpoint(run_folder)


def neuron_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the neuron model for that of a model of blocks.

    Raises:
        ConfigError: the model has no blocks, or has what single neurons cannot have.
    """
    tree = copy.deepcopy(tree)
    moe = ModelConfig.model_validate(tree["model"]).moe
    if moe is None or moe.infinite is None or moe.infinite.granularity != "block":
        raise ConfigError(
            "the model has no blocks of neurons to convert: model.moe.infinite.granularity = "
            "block makes such a model"
        )
    blocks = moe.experts
    section = tree["model"]["moe"]
    section["infinite"] |= {
        "granularity": "neuron",
        "ffn_dim": moe.space_width,
        "block_size": None,
        # What was kept of the blocks, exactly, whatever it had been rounded from.
        "active_fraction": num_active(moe.infinite.active_fraction, blocks) / blocks,
    }
    # The balance of blocks acts on training alone.
    section["losses"] |= {"load_balance_weight": 0.0, "z_loss_weight": 0.0}
    section |= {"num_experts": None, "expert_ffn_dim": None}
    ModelConfig.model_validate(tree["model"])
    return tree
