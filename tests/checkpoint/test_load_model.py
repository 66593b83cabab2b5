"""A model out of a checkpoint: the logits of where it was trained, or an error that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe.checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    CorruptCheckpointError,
    LoadedModel,
    load_model,
)
from dmoe.config import ConfigError, config_tree
from dmoe.data import MicroBatch
from dmoe.engine import NativeEngine, StepPosition
from dmoe.models import ModelInputs
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed
from dmoe.trainer.config import Config

SEQ_LEN, VOCAB, STEP = 12, 32, 7


def config_of(**engine: Any) -> Config:
    router = {"name": "top_k", "top_k": 2, "bias_update_rate": 0.01}
    moe = {"num_experts": 4, "expert_ffn_dim": 16, "num_dense_layers": 1, "router": router}
    size = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": VOCAB}
    return Config.model_validate({"model": {**size, "moe": moe}, "engine": engine})


def text() -> Tensor:
    return (torch.arange(2 * (SEQ_LEN + 1)).view(2, -1) * 5) % VOCAB


def train_and_save(run: Path, ep: int, engine_section: dict[str, Any]) -> Tensor:
    """Take one step, save a run folder, and return the logits of the trained model."""
    config = config_of(**engine_section)
    dims = ParallelDims.create(ep=ep)
    engine = NativeEngine(
        config.engine,
        model=config.model,
        optim=config.optim,
        dims=dims,
        device=torch.device("cpu"),
        seed=3,
    )
    ids, places = text(), torch.arange(SEQ_LEN).expand(2, -1)
    batch = MicroBatch(
        dims.rank, torch.arange(2), ids[:, :-1], ids[:, 1:], places, torch.zeros_like(places)
    )
    position = StepPosition(0, 0, 2 * dims.world_size, dims.world_size)
    result = engine.forward_backward([batch], position)
    engine.step(0.01, result)
    manager = CheckpointManager(run / "checkpoints", CheckpointConfig())
    tree = config_tree(config)
    manager.save(STEP, engine.state(), {"config": tree}, tree)
    manager.close()
    with torch.no_grad():
        return engine.model(ModelInputs(ids)).logits


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return loaded.model(ModelInputs(text())).logits


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train_and_save(tmp_path / "run", 1, {})
    return tmp_path / "run"


def folder_of(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEP:08d}"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_logits_are_those_of_the_trained_model(precision: str, tmp_path: Path) -> None:
    expected = train_and_save(tmp_path, 1, {"precision": precision})
    loaded = load_model(tmp_path, compute_dtype=expected.dtype)
    assert torch.equal(logits(loaded), expected)
    assert not loaded.model.training


def test_run_folder_and_checkpoint_folder_are_the_same(run: Path) -> None:
    by_run, by_root, by_folder = map(load_model, (run, run / "checkpoints", str(folder_of(run))))
    for loaded in (by_run, by_root, by_folder):
        assert (loaded.step, loaded.path) == (STEP, folder_of(run))
        assert torch.equal(logits(loaded), logits(by_run))
    assert Config.model_validate(by_run.config) == config_of()


def test_from_two_ranks_that_shared_experts_and_parameters(tmp_path: Path) -> None:
    by_rank = run_distributed(train_and_save, 2, tmp_path, 2, {"zero_stage": 3})
    loaded = logits(load_model(tmp_path))
    for expected in by_rank:
        torch.testing.assert_close(loaded, expected)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damaged_weights_are_not_loaded(run: Path) -> None:
    [weights] = folder_of(run).glob("*.safetensors")
    flip_last_byte(weights)
    with pytest.raises(CorruptCheckpointError, match=weights.name):
        load_model(run)


@pytest.mark.parametrize(
    ("old", "new"), [('"num_heads": 2', '"num_heads": 3'), ('"model"', '"modem"')]
)
def test_a_damaged_description_is_not_believed(old: str, new: str, run: Path) -> None:
    path = folder_of(run) / "metadata.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    json.loads(path.read_text())
    with pytest.raises(CorruptCheckpointError, match=r"metadata\.json"):
        load_model(run)


def test_a_missing_manifest_is_damage(run: Path) -> None:
    (folder_of(run) / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        load_model(run)


@pytest.mark.parametrize("name", ["", "nowhere", "empty", "file"])
def test_a_path_without_a_checkpoint_is_the_users_mistake(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="neither a checkpoint folder nor a run folder"):
        load_model(tmp_path / name)


def test_a_save_killed_before_its_pointer_is_found(run: Path) -> None:
    """As resuming does, so that `dmoe eval` and `dmoe train` speak of the same checkpoint."""
    (run / "checkpoints" / "latest").unlink()
    assert load_model(run).step == STEP
