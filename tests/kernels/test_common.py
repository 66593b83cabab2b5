"""What kernels are told of widths."""

import pytest

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")
common = pytest.importorskip("dmoe_kernels.common")


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((1024, 2048), False),  # the launch says by itself that 16 divides them
        ((1000, 2048), True),
        ((2048, 1368), True),
        ((8, 24), True),
        ((1001, 2048), False),  # it would be wrong
        ((1000, 1001), False),
    ],
)
def test_by_eights(sizes: tuple[int, int], told: bool) -> None:
    assert common.by_eights(*sizes) is told
