"""A router from outside: the package of the README, installed, and found by its metadata."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
SMALL = ["parallel.ep=1", "model.dim=16", "model.ffn_dim=16", "model.moe.expert_ffn_dim=8"]
SMALL += ["train.steps=2", "train.seq_len=32", "train.global_batch_size=2"]
SMALL += ["train.micro_batch_size=2", "eval.sample_tokens=2", "metrics.tensorboard=false"]
SMALL += ["data.sources.0.path=data/mine"]


def block(language: str, words: str) -> str:
    """Return the code block of the README that has these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    [found] = [text for text in blocks if words in text]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder on the path with the package, as an installer leaves it, and its config."""
    (tmp_path / "dmoe_cosine.py").write_text(block("python", "class CosineRouter"))
    metadata = tmp_path / "dmoe_cosine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dmoe-cosine\nVersion: 1.0\n")
    table, line = block("toml", "[project.entry-points").splitlines()
    assert table == '[project.entry-points."dmoe.routers"]'
    points = f"[dmoe.routers]\n{line.replace(chr(34), '')}\n"
    (metadata / "entry_points.txt").write_text(points)
    config = block("yaml", "# configs/mine_cosine.yaml")
    quickstart = ROOT / "configs" / "quickstart.yaml"
    (tmp_path / "mine.yaml").write_text(config.replace("quickstart.yaml", str(quickstart)))
    return tmp_path


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process, which looks for plug-ins anew."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_router_takes_30_lines() -> None:
    assert len(block("python", "class CosineRouter").splitlines()) <= 30


def test_trains_and_is_known_everywhere(folder: Path) -> None:
    (folder / "text.txt").write_text(README)
    done = run(
        folder,
        f"""
import dmoe_cosine  # the plug-in itself may come first
from dmoe.cli import main
from dmoe.config import load_config, config_schema
from dmoe.data import prepare
from dmoe.models import build_model

model = build_model(load_config("mine.yaml").model)
assert isinstance(model.moe_layers[0].router, dmoe_cosine.CosineRouter)
assert "CosineConfig" in config_schema()["$defs"]
prepare(["text.txt"], "data/mine", split_paragraphs=True)
assert main(["train", "mine.yaml", *{SMALL}]) == 0
""",
    )
    assert done.returncode == 0, done.stderr
    saved = (folder / "runs" / "quickstart" / "config.yaml").read_text()
    assert "name: cosine" in saved
    assert "temperature: 0.2" in saved


def test_mistakes_are_told_as_for_any_router(folder: Path) -> None:
    mistakes = {
        "temprature=1": "did you mean 'temperature'? (allowed: name, top_k, temperature)",
        "temperature=-1": "input should be greater than 0",
        "name=cosinus": "unknown name 'cosinus'; did you mean 'cosine'?",
        "top_k=17": "router.top_k = 17 is more than num_experts = 16",
    }
    done = run(
        folder,
        f"""
from dmoe.config import ConfigError, load_config

for override, message in {mistakes}.items():
    try:
        load_config("mine.yaml", [f"model.moe.router.{{override}}"])
    except ConfigError as error:
        assert message in str(error), error
    else:
        raise AssertionError(override)
""",
    )
    assert done.returncode == 0, done.stderr


def test_without_the_package_the_name_is_unknown(folder: Path) -> None:
    (folder / "dmoe_cosine-1.0.dist-info" / "entry_points.txt").unlink()
    done = run(folder, "from dmoe.config import load_config; load_config('mine.yaml')")
    assert done.returncode == 1
    assert "mine.yaml:5: model.moe.router.name: unknown name 'cosine'" in done.stderr
