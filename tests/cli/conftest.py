from pathlib import Path

import pytest
import yaml
from command import STEPS, dmoe, prepare_store

# Weights large enough that a text depends on the experts.
SIZES = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "init_std": 0.1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, the store made of it, a configuration, and a run of it."""
    folder = tmp_path_factory.mktemp("cli")
    paragraphs = (f"paragraph {i}: " + "one two three four; " * (1 + i % 5) for i in range(100))
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    assert prepare_store(folder, "--holdout", 0.1).status == 0
    moe = {"num_experts": 4, "expert_ffn_dim": 16, "router": {"name": "top_k", "top_k": 2}}
    config = {
        "run": {"name": "tiny", "dir": str(folder)},
        "model": {**SIZES, "moe": moe},
        "data": {"sources": [{"path": str(folder / "store")}]},
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "seq_len": 32},
        "eval": {"sample_tokens": 3},
        "metrics": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    trained = dmoe("train", folder / "run.yaml")
    assert trained.status == 0, trained.err
    assert "held-out loss" in trained.out
    return folder


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    return folder / "tiny"


@pytest.fixture(scope="session")
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEPS:08d}"
