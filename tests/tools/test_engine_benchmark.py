"""`dmoe estimate` against what both engines hold of parameters, gradients and optimizer state."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks"))
import engines


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "stage"), engines.ENGINES)
def test_the_estimate_is_within_5_percent(name: str, stage: int, precision: str) -> None:
    measured, expected = engines.compare(name, stage, precision)
    for kind in ("parameters", "gradients", "optimizer"):
        assert measured[kind] == pytest.approx(expected[kind], rel=0.05), kind
