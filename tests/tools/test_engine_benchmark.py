"""`dmoe estimate` against what both engines hold of parameters, gradients and optimizer state."""

import sys
from pathlib import Path

import pytest

from dmoe.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks"))
import engines


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_within_5_percent(precision: str) -> None:
    by_engine = run_distributed(engines.memories, 2, precision, timeout=280)[0]
    assert [engine for engine, _, _ in by_engine] == [f"{n} {s}" for n, s in engines.ENGINES]
    for engine, measured, expected in by_engine:
        for kind in ("parameters", "gradients", "optimizer"):
            assert measured[kind] == pytest.approx(expected[kind], rel=0.05), (engine, kind)
