"""What experts cannot run on is told before a run has a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from dmoe.config import ConfigError
from dmoe.trainer.build import open_run

NEURONS = {"infinite": {"ffn_dim": 32, "granularity": "neuron"}}


@pytest.mark.parametrize(
    ("engine", "moe", "message"),
    [
        ({"tune_kernels": True}, {}, "model.moe.backend takes loop here: set it to false, or"),
        ({"tune_kernels": True}, NEURONS, "no routed experts in grouped products: set it to"),
        ({}, {"backend": "triton"}, "needs an NVIDIA or AMD GPU, this device is cpu"),
        ({}, {**NEURONS, "backend": "triton"}, "needs an NVIDIA or AMD GPU, this device is cpu"),
    ],
)
def test_is_told_before_the_run(
    token_store: Path, tmp_path: Path, monkeypatch, engine: Any, moe: Any, message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # where kernels are tested
    config = tiny_config(token_store, tmp_path / "runs", engine=engine)
    tree = config.model_dump()
    if "infinite" in moe:
        tree["model"]["moe"] = {"num_dense_layers": 1}
    tree["model"]["moe"] |= moe
    with (
        pytest.raises(ConfigError, match=message),
        open_run(type(config).model_validate(tree), torch.device("cpu")),
    ):
        pass
    assert not (tmp_path / "runs").exists()


def test_a_run_says_what_auto_takes_once(token_store: Path, tmp_path: Path, capsys) -> None:
    """A run that names its back end says nothing of it."""
    for backend, times in (("auto", 1), ("loop", 0)):
        config = tiny_config(token_store, tmp_path / backend)
        tree = config.model_dump()
        tree["model"]["moe"]["backend"] = backend
        with open_run(type(config).model_validate(tree), torch.device("cpu")) as run:
            run.trainer.fit()
        out = capsys.readouterr().out
        assert out.count("backend: auto takes") == times
        assert out.count("model.moe.backend: auto takes loop") == times


def test_kernels_are_measured_as_long_as_a_run_lasts(
    token_store: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("dmoe.trainer.build.resolve_backend", lambda *_: "triton")
    reports: list[Any] = []
    monkeypatch.setattr("dmoe.trainer.build.tune_kernels", reports.append)
    for tune in (False, True):
        config = tiny_config(token_store, tmp_path / str(tune), engine={"tune_kernels": tune})
        with open_run(config, torch.device("cpu")):
            assert len(reports) == tune
            capsys.readouterr()
            for report in reports:
                report("up: 1.000 ms")
            assert capsys.readouterr().out == "up: 1.000 ms\n" * tune
    assert reports[1:] == [None]
