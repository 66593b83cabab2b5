import pytest
import torch

from dmoe.config.base import ConfigError
from dmoe.ops import backend as door
from dmoe.ops import matmul
from dmoe.ops.backend import resolve_backend, uses_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("by_onednn", [True, False])
def test_auto_is_torch_but_for_what_onednn_multiplies_on_a_cpu(monkeypatch, by_onednn) -> None:
    monkeypatch.setattr(matmul, "_ONEDNN_IS_FASTER", by_onednn)
    assert resolve_backend("auto", CPU) == ("loop" if by_onednn else "torch")
    assert resolve_backend("auto", CPU, rows_an_expert=63) == "torch"
    assert resolve_backend("loop", CPU, rows_an_expert=63) == "loop"
    assert resolve_backend("auto", CPU, torch.bfloat16, rows_an_expert=1) == "loop"
    assert resolve_backend("torch", CPU) == "torch"
    assert resolve_backend("auto", GPU) == "torch"
    assert resolve_backend("auto", CPU, torch.bfloat16) == "loop"
    assert resolve_backend("torch", CPU, torch.bfloat16) == "torch"


@pytest.mark.parametrize(
    ("capability", "is_installed", "release", "expected"),
    [
        ((9, 0), True, (3, 6), "triton"),
        ((9, 0), False, (3, 6), "torch"),
        ((8, 0), True, (3, 6), "torch"),
        ((9, 0), True, (3, 9), "torch"),
    ],
)
def test_auto_is_triton_where_it_was_timed(
    monkeypatch,
    capability: tuple[int, int],
    is_installed: bool,
    release: tuple[int, int],
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(door, "_is_installed", lambda *packages: is_installed)
    monkeypatch.setattr(door, "_triton", lambda: release)
    assert resolve_backend("auto", GPU, torch.bfloat16) == expected
    assert resolve_backend("auto", GPU, torch.float16) == expected
    assert resolve_backend("auto", GPU, torch.float32) == "torch"
    assert uses_kernels("auto", GPU, torch.bfloat16) == (expected == "triton")
    for dtype in (torch.float32, torch.float64):
        assert not uses_kernels("auto", GPU, dtype), "where the products are torch's, all is"
    assert not uses_kernels("auto", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("release", "numbers"), [("3.6.0+git1", (3, 6)), ("3.10rc1", (3, 10)), (None, ())]
)
def test_the_release_of_triton_is_read(monkeypatch, release: str | None, numbers: tuple) -> None:
    def version(package: str) -> str:
        if release is None:
            raise door.PackageNotFoundError
        return release

    monkeypatch.setattr(door, "version", version)
    assert door._triton.__wrapped__() == numbers


def test_auto_is_torch_where_a_gpu_is_named_and_none_is_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_backend("auto", GPU, torch.bfloat16) == "torch"


def test_float64_is_a_loop_everywhere() -> None:
    assert resolve_backend("torch", GPU, torch.float64) == "loop"


@pytest.mark.parametrize(
    ("backend", "remedy"),
    [("triton", "pip install triton"), ("megablocks", r"pip install 'dmoe\[megablocks\]'")],
)
def test_what_is_not_installed_says_how_to_install_it(backend, remedy, monkeypatch) -> None:
    monkeypatch.setattr(door, "_is_installed", lambda *packages: False)
    with pytest.raises(ConfigError, match=remedy):
        resolve_backend(backend, GPU)


def test_kernels_need_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(door, "_is_installed", lambda *packages: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_backend("triton", GPU) == "triton"
    with pytest.raises(ConfigError, match="needs an NVIDIA or AMD GPU, this device is cpu"):
        resolve_backend("triton", CPU)


def test_kernels_need_a_gpu_that_they_compile_for(monkeypatch) -> None:
    monkeypatch.setattr(door, "_is_installed", lambda *packages: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability in ((8, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        if capability[0] == 8:
            assert resolve_backend("triton", GPU) == "triton"
        else:
            with pytest.raises(ConfigError, match=r"Tesla T4, has 7\.5: set"):
                resolve_backend("triton", GPU)


def test_megablocks_multiplies_bfloat16(monkeypatch) -> None:
    monkeypatch.setattr(door, "_is_installed", lambda *packages: True)
    assert resolve_backend("megablocks", GPU, torch.bfloat16) == "megablocks"
    for device, dtype in ((GPU, torch.float32), (CPU, torch.bfloat16)):
        with pytest.raises(ConfigError, match="to bf16"):
            resolve_backend("megablocks", device, dtype)
