"""A checkpoint of blocks, converted: the same logits from a model of single neurons."""

from pathlib import Path

import pytest
import torch

from dmoe.checkpoint import CheckpointConfig, CheckpointManager, load_model
from dmoe.checkpoint.neurons import convert_to_neurons
from dmoe.config import ConfigError
from dmoe.models import ModelConfig, ModelInputs, build_model

SIZES = {"vocab_size": 19, "dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24}
# A quarter of 10 blocks rounds to 3.
INFINITE = {"granularity": "block", "ffn_dim": 80, "block_size": 8, "active_fraction": 0.25}


def saved(folder: Path, **moe) -> ModelConfig:
    tree = {**SIZES, "moe": {"num_dense_layers": 1, "infinite": INFINITE, **moe}}
    config = ModelConfig.model_validate(tree)
    whole = {"model": config.model_dump(mode="json"), "engine": {"precision": "fp64"}}
    state = build_model(config, compute_dtype=torch.float64).state_dict()
    manager = CheckpointManager(folder / "checkpoints", CheckpointConfig())
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    manager.save(7, tensors, {"config": whole}, whole, block=True)
    manager.close()
    return config


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_logits_stay(tmp_path, family, monkeypatch) -> None:
    monkeypatch.setitem(SIZES, "family", family)
    saved(tmp_path / "blocks", losses={"load_balance_weight": 0.1})
    folder = convert_to_neurons(tmp_path / "blocks", tmp_path / "neurons")
    before, after = load_model(tmp_path / "blocks"), load_model(folder)
    assert after.step == 7
    assert after.model.config.moe.infinite.granularity == "neuron"
    inputs = ModelInputs(torch.arange(18).view(2, 9))
    for samples in (None, 4):
        before.model.set_samples(samples)
        after.model.set_samples(samples)
        with torch.no_grad():
            got, want = after.model(inputs).logits, before.model(inputs).logits
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_converted_is_refused(tmp_path) -> None:
    experts = {"num_experts": 4, "expert_ffn_dim": 8, "infinite": None}
    saved(tmp_path / "experts", **experts)
    with pytest.raises(ConfigError, match="no blocks"):
        convert_to_neurons(tmp_path / "experts", tmp_path / "out")
    saved(tmp_path / "shared", num_shared_experts=1)
    with pytest.raises(ValueError, match=r"num_shared_experts \(1\)"):
        convert_to_neurons(tmp_path / "shared", tmp_path / "out")
    with pytest.raises(ConfigError, match="there already"):
        convert_to_neurons(tmp_path / "shared", tmp_path / "experts")
