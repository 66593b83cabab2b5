"""DeepSpeed starts without building anything, and without waiting for a build that died."""

import importlib
import os
from pathlib import Path

import pytest
import torch
from small_engine import small_engine, train

from dmoe.config import ConfigError
from dmoe.engine.zero_setup import load_async_io, load_deepspeed
from dmoe.testing import run_distributed


def built_while_training(folder: Path) -> list[str]:
    """What is in the folder of extensions after a step, where a killed build has left its lock."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    lock = folder / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    train(small_engine(name="deepspeed", zero_stage=1), steps=1)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_nothing_is_built_and_no_dead_build_is_waited_for(tmp_path: Path) -> None:
    [found] = run_distributed(built_while_training, 1, tmp_path)
    assert found == ["deepspeed_shm_comm", "deepspeed_shm_comm/lock"]


def refusal_of_nvme(folder: Path) -> tuple[bool, str]:
    """Whether libaio is here, and what is said where a build of long ago has left its lock."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    lock = folder / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    load_deepspeed(torch.device("cpu"))
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    with pytest.raises(ConfigError) as refused:
        load_async_io()
    return builder.is_compatible(verbose=False), str(refused.value)


def test_a_dead_build_for_nvme_is_named(tmp_path: Path) -> None:
    [(has_libaio, message)] = run_distributed(refusal_of_nvme, 1, tmp_path)
    assert "offload_optimizer.device" in message
    if has_libaio:
        assert f"{tmp_path / 'async_io' / 'lock'} is older than 30 minutes" in message
        assert "delete it" in message
    else:
        assert "apt install libaio-dev" in message


def test_another_accelerator_in_the_environment_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(ConfigError, match=r"DS_ACCELERATOR is 'cuda'.*'cpu'.*unset it"):
        load_deepspeed(torch.device("cpu"))


def refusal_of_fp16() -> str:
    """What is said on a CPU without instructions for it, after bf16 was taken there."""
    load_deepspeed(torch.device("cpu"))
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    accelerator.is_fp16_supported = lambda: False
    small_engine(name="deepspeed", zero_stage=2, precision="bf16")
    with pytest.raises(ConfigError) as refused:
        small_engine(name="deepspeed", zero_stage=2, precision="fp16")
    return str(refused.value)


def test_fp16_that_deepspeed_refuses_is_told() -> None:
    [message] = run_distributed(refusal_of_fp16, 1)
    assert "engine.precision is fp16" in message
    assert "set it to bf16" in message
