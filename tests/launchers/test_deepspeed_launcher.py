"""DeepSpeed's launcher starts the same training that torchrun starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers" / "deepspeed_launcher.sh"
SMALL = [
    "model.dim=16",
    "model.ffn_dim=16",
    "model.moe.expert_ffn_dim=8",
    "train.steps=2",
    "train.seq_len=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "eval.max_batches=1",
    "eval.sample_tokens=0",
    "metrics.tensorboard=false",
]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_without_arguments_it_says_how_to_call_it() -> None:
    done = launch()
    assert done.returncode == 2
    assert "-- CONFIG [a.b=c ...]" in done.stderr


@pytest.mark.slow
def test_it_trains_on_two_processes(tmp_path: Path) -> None:
    engine = ["engine.name=deepspeed", "engine.zero_stage=3", f"run.dir={tmp_path}"]
    options = ["--num_gpus", "2", "--master_port", "29617"]
    done = launch(*options, "--", "configs/quickstart.yaml", *SMALL, *engine)
    assert done.returncode == 0, done.stderr
    assert "world 2 = edp 1 x ep 2" in done.stdout
    assert (tmp_path / "quickstart" / "checkpoints" / "latest").exists()
