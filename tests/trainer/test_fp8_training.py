"""A run with experts in eight bits learns as one without."""

from pathlib import Path

import pytest
from tiny import run_tiny, tiny_config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_stays_close(token_store: Path, tmp_path: Path, precision: str) -> None:
    losses: dict[str, list[float]] = {}
    for dtype in ("same", "fp8"):
        config = tiny_config(
            token_store,
            tmp_path / dtype,
            model={
                "dim": 128,
                "moe": {
                    "num_experts": 4,
                    "expert_ffn_dim": 128,
                    "router": {"name": "top_k", "top_k": 2},
                    "expert_dtype": dtype,
                },
            },
            engine={"precision": precision},
            train={"steps": 24},
            optim={"lr": 3e-3, "schedule": {"warmup_steps": 2}},
            checkpoint={"every": 24},
            eval={"every": 24},
        )
        rows, _ = run_tiny(config)
        losses[dtype] = [row["loss"] for row in rows.values()]
    wide, narrow = losses["same"], losses["fp8"]
    assert wide[-1] < wide[0] - 1.5, "it learns"
    assert wide != narrow
    assert all(abs(a - b) < 0.03 for a, b in zip(wide, narrow, strict=True)), losses
