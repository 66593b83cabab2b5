"""The doctor reports on this machine, and says what to do about one that is not well."""

import json
import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dmoe.trainer import doctor as subject
from dmoe.trainer.doctor import Check, doctor, render

NAMES = [
    "python",
    "torch",
    "dmoe",
    "triton",
    "deepspeed",
    "devices",
    "experts",
    "communication",
    "disk speed",
    "disk space",
    "compiler",
    "open files",
]


def fake_ping(fn: object, world_size: int, backend: str, *, timeout: float) -> list[object]:
    return [(1e-4, 1e9)] * world_size


@pytest.fixture
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "run_distributed", fake_ping)


def by_name(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in doctor(folder)}


def test_this_machine_talks_to_itself() -> None:
    check = subject._communication()
    assert check.status == "ok", check.detail
    assert "16 MB" in check.detail


@pytest.mark.parametrize(
    ("capability", "taken", "status"),
    [((9, 0), "triton", "ok"), ((9, 0), "torch", "warn"), ((8, 0), "torch", "ok")],
)
def test_says_what_experts_run_on_and_how_to_have_the_kernels(
    monkeypatch, capability: tuple[int, int], taken: str, status: str
) -> None:
    assert subject._experts().detail == "model.moe.backend=auto takes loop in bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(subject, "resolve_backend", lambda *_: taken)
    check = subject._experts()
    assert check.status == status
    assert check.detail.startswith(f"model.moe.backend=auto takes {taken} in bfloat16")
    assert ("Triton 3.6" in check.detail) == (status == "warn")


@pytest.mark.usefixtures("without_processes")
def test_every_look_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = doctor(tmp_path)
    assert [check.name for check in checks] == NAMES
    assert all(check.status != "fail" for check in checks), checks
    tree = json.loads(json.dumps([asdict(check) for check in checks]))
    assert [set(row) for row in tree] == [{"name", "status", "detail"}] * len(NAMES)
    Console(width=200).print(render(checks))
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert torch.__version__ in shown


@pytest.mark.usefixtures("without_processes")
def test_a_run_folder_need_not_exist_and_is_left_clean(tmp_path: Path) -> None:
    checks = by_name(tmp_path / "runs" / "later")
    assert checks["disk speed"].status != "fail"
    assert str(tmp_path) in checks["disk speed"].detail
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_processes")
def test_a_folder_that_cannot_be_written_fails_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(subject.tempfile, "TemporaryFile", refuse)
    check = by_name(tmp_path)["disk speed"]
    assert check.status == "fail"
    assert "Permission denied" in check.detail
    assert "run.dir" in check.detail


def test_processes_that_cannot_meet_fail_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("rank 0 failed:\nTraceback ...\nRuntimeError: no route to host")

    monkeypatch.setattr(subject, "run_distributed", fail)
    check = by_name(tmp_path)["communication"]
    assert check.status == "fail"
    assert "no route to host" in check.detail
    assert "Traceback" not in check.detail
    assert "GLOO_SOCKET_IFNAME" in check.detail or "NCCL_DEBUG" in check.detail


@pytest.mark.usefixtures("without_processes")
def test_nothing_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("driver and library do not match")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    checks = by_name(tmp_path)
    for name in ("devices", "communication"):
        assert checks[name].status == "fail"
        assert "driver and library do not match" in checks[name].detail


@pytest.mark.usefixtures("without_processes")
def test_poor_machines_are_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 65536))
    monkeypatch.setattr(subject, "_SLOW_DISK", 10**15)
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    monkeypatch.setattr(subject.platform, "python_version_tuple", lambda: ("3", "9", "1"))
    checks = by_name(tmp_path)
    advice = {
        "python": ("fail", "3.11"),
        "torch": ("fail", "2.11"),
        "compiler": ("warn", "engine.compile"),
        "disk space": ("warn", "make room"),
        "disk speed": ("warn", "faster disk"),
        "open files": ("warn", "ulimit -n 65536"),
    }
    for name, (status, words) in advice.items():
        assert checks[name].status == status
        assert words in checks[name].detail
