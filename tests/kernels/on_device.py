"""What tests of kernels share: on a GPU they run there, elsewhere in Triton's interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


INTERPRETER_FAILS = ""
if _numbers(triton.__version__) < (3, 7) and _numbers(numpy.__version__) >= (2, 4):
    INTERPRETER_FAILS = (
        f"the interpreter of Triton {triton.__version__} needs numpy below 2.4, this is "
        f"{numpy.__version__}: pip install 'numpy<2.4'"
    )
if DEVICE.type == "cpu" and INTERPRETER_FAILS:
    pytest.skip(INTERPRETER_FAILS, allow_module_level=True)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare in float64, by the norm of the difference."""
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected.double().cpu()).norm()
    assert error <= tolerance * expected.double().cpu().norm(), f"error {error:.2e}"


def twice(compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return what `compute` does; called again, in poisoned memory, it must give the same bits."""
    first = compute()
    with poisoned():
        second = compute()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    return first


@contextmanager
def poisoned() -> Iterator[None]:
    """Let torch fill new memory with NaN, or the largest integer, until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def load_by(monkeypatch: pytest.MonkeyPatch, *, tma: bool) -> None:
    """Let products load by TMA what they can, or compute all addresses."""
    from dmoe_kernels import configs

    def choose(kernel, form, dtype, shape, device, run, *, tma=False, wanted=tma, **_):
        if configs.INTERPRET.value:
            fitting = [configs._INTERPRETED._replace(tma=value) for value in (False, True)]
        else:
            fitting = configs._candidates_of(kernel, dtype, device, tma=tma, gluon=False)
        return next((c for c in fitting if c.tma == (wanted and tma)), fitting[0])

    for module in ("up", "dz", "grouped_gemm"):
        monkeypatch.setattr(f"dmoe_kernels.{module}.choose", choose)
