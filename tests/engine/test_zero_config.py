"""What a user may add to DeepSpeed's configuration, and what is refused, naming both keys."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from dmoe.engine import EngineConfig
from dmoe.engine.zero_config import deepspeed_settings


def engine(**section: Any) -> EngineConfig:
    return EngineConfig.model_validate({"name": "deepspeed", "zero_stage": 2, **section})


def test_settings_are_merged_section_by_section() -> None:
    extra = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7}, "dump_state": 1}
    settings = deepspeed_settings(stage=3, precision="bf16", extra=extra)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert settings["bf16"] == {"enabled": True}
    assert settings["dump_state"] == 1


def test_what_says_the_same_is_no_contradiction() -> None:
    assert engine(deepspeed={"zero_optimization": {"stage": 2}})


@pytest.mark.parametrize(
    ("extra", "ours"),
    [
        ({"zero_optimization": {"stage": 3}}, "engine.zero_stage"),
        ({"bf16": {"enabled": True}}, "engine.precision"),
        ({"fp16": {"enabled": True, "loss_scale_window": 5}}, "engine.precision"),
        ({"communication_data_type": "bf16"}, "engine.precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "engine.precision"),
        ({"gradient_clipping": 1.0}, "optim.max_grad_norm"),
        ({"gradient_accumulation_steps": 4}, "train.micro_batch_size"),
        ({"train_batch_size": 4}, "train.global_batch_size"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "optim.schedule"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "train.recompute"),
        ({"zero_force_ds_cpu_optimizer": True}, "engine.name"),
    ],
)
def test_a_contradiction_names_both_keys(extra: dict[str, Any], ours: str) -> None:
    [theirs] = list(extra)
    pattern = rf"engine\.deepspeed\.{theirs}.* contradicts {re.escape(ours)}\b"
    with pytest.raises(ValidationError, match=pattern):
        engine(deepspeed=extra)


@pytest.mark.parametrize(
    ("zero", "reason"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, "set .*offload_optimizer.nvme_path"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "prefetches from the disk"),
        ({"round_robin_gradients": True}, "mix them up"),
        ({"stage3_module_granularity_threshold": 9}, "experts"),
        ({"leaf_module": {"classes": ["Block"]}}, "experts"),
    ],
)
def test_what_would_be_wrong_is_refused_with_the_reason(zero: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        engine(zero_stage=3, deepspeed={"zero_optimization": zero})


def test_nvme_needs_stage_3() -> None:
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
    engine(zero_stage=3, deepspeed={"zero_optimization": zero})
    with pytest.raises(ValidationError, match=r"needs ZeRO 3, and engine.zero_stage is 2"):
        engine(zero_stage=2, deepspeed={"zero_optimization": zero})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_stage": 0}, "engine.zero_stage = 0.* set it to 1, 2 or 3"),
        ({"precision": "fp64"}, "engine.precision = fp64.* native"),
        ({"compile": True}, "engine.compile = True.* native"),
        ({"name": "native", "zero_stage": 1}, "engine.zero_stage = 1 .* set it to 2"),
        ({"name": "native", "deepspeed": {"dump_state": True}}, "engine.deepspeed .* native"),
    ],
)
def test_what_an_engine_has_not_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        engine(**section)
