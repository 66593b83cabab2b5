"""What tests of kernels share: on a GPU they run there, elsewhere in Triton's interpreter."""

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
