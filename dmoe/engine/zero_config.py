"""The DeepSpeed configuration of a run: ours, merged with what the user adds to it.

DeepSpeed has settings for much that dmoe decides itself. A user's value for such a thing would
either be ignored or act twice, so it is refused, and the message names the key that decides.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dmoe.config.base import ConfigError

Settings = dict[str, Any]

_BUCKET_ELEMENTS = 50_000_000

_DECIDED_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "managed_gradient_accumulation": "train.micro_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "activation_checkpointing": "train.recompute",
    "compile": "engine.compile",
    "checkpoint": "checkpoint",
    "expert_parallel": "parallel.ep",
    "tensor_parallel": "parallel.ep",
    "sequence_parallel_size": "parallel.ep",
    "data_efficiency": "data",
    "curriculum_learning": "data",
    "tensorboard": "metrics.tensorboard",
    "zero_optimization.zenflow": "optim",
}
_TAKEN_FROM = {
    "zero_optimization.stage": "engine.zero_stage",
    "data_types.grad_accum_dtype": "engine.precision",
    "communication_data_type": "engine.precision",
}
_LEAVES_OUT_EXPERTS = (
    "it hands modules over whole, with the experts that are kept out of DeepSpeed's sight"
)
_CANNOT_BE = {
    "zero_optimization.leaf_module": _LEAVES_OUT_EXPERTS,
    "zero_optimization.stage3_module_granularity_threshold": _LEAVES_OUT_EXPERTS,
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19 then tells wrongly which rank owns "
    "which weights, and a checkpoint would mix them up",
}
_OPTIMIZER_DEVICE = "zero_optimization.offload_optimizer.device"


def deepspeed_settings(
    *, stage: int, precision: str, extra: Mapping[str, Any], num_elements: int = _BUCKET_ELEMENTS
) -> Settings:
    """Return the whole DeepSpeed configuration.

    Args:
        stage: of ZeRO: 1, 2 or 3.
        precision: "fp32", "bf16" or "fp16".
        extra: the user's part, as DeepSpeed names it.
        num_elements: of all parameters that DeepSpeed gets.

    Raises:
        ConfigError: `extra` sets what another key decides; the message names both.
    """
    given = dict(_leaves(extra))
    for path, value in given.items():
        _check_may_be_set(path, value)
    _check_nvme(given, stage)
    ours = dict(_leaves(_fixed(stage, precision)))
    for path, value in given.items():
        if path in ours and ours[path] != value:
            source = _TAKEN_FROM.get(path, "engine.name = deepspeed")
            raise ConfigError(
                f"engine.deepspeed.{path} = {value} contradicts {source}, from which it is "
                f"{ours[path]}: remove the first, or change the second",
                key=f"deepspeed.{path}",
            )
    return _merge(_merge(_defaults(num_elements), extra), _fixed(stage, precision))


def _check_may_be_set(path: str, value: Any) -> None:
    key = f"deepspeed.{path}"
    for section, decides in _DECIDED_BY.items():
        if f"{path}.".startswith(f"{section}."):
            raise ConfigError(
                f"engine.{key} = {value} contradicts {decides}, which alone decides this: remove "
                f"it and set {decides}",
                key=key,
            )
    for section, reason in _CANNOT_BE.items():
        if f"{path}.".startswith(f"{section}."):
            raise ConfigError(
                f"engine.{key} = {value} does not go with dmoe: {reason}; remove it", key=key
            )


def uses_nvme(settings: Mapping[str, Any]) -> bool:
    """Say whether optimizer state lies on a disk."""
    return dict(_leaves(settings)).get(_OPTIMIZER_DEVICE) == "nvme"


def _check_nvme(given: Mapping[str, Any], stage: int) -> None:
    if given.get("zero_optimization.offload_param.device") == "nvme":
        key = "deepspeed.zero_optimization.offload_param.device"
        raise ConfigError(
            f"engine.{key} = nvme fails in DeepSpeed 0.19, which assigns the buffer of a weight "
            f"twice as it prefetches from the disk: set it to cpu, and "
            f"engine.deepspeed.{_OPTIMIZER_DEVICE} to nvme",
            key=key,
        )
    if given.get(_OPTIMIZER_DEVICE) != "nvme":
        return
    key = f"deepspeed.{_OPTIMIZER_DEVICE}"
    if stage != 3:
        raise ConfigError(
            f"engine.{key} = nvme needs ZeRO 3, and engine.zero_stage is {stage}: set the stage to "
            f"3, or the device to cpu",
            key=key,
        )
    folder = "zero_optimization.offload_optimizer.nvme_path"
    if not given.get(folder):
        raise ConfigError(
            f"engine.{key} = nvme, but no folder is given for it: set engine.deepspeed.{folder}",
            key=key,
        )


def _fixed(stage: int, precision: str) -> Settings:
    """What the engine relies on; it scales losses, clips and counts micro-batches by itself."""
    settings: Settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
        # Our AdamW: a subclass, and on the CPU as fast as DeepSpeed's own, which is to be built.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
    elif precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return settings


def _defaults(num_elements: int) -> Settings:
    """What the user may change."""
    return {
        "steps_per_print": 10**9,
        "zero_optimization": {
            # Its own 500 million are a buffer of 2 GB on every rank, however small the model.
            "reduce_bucket_size": min(num_elements, _BUCKET_ELEMENTS),
            "memory_efficient_linear": False,
        },
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Settings:
    """Return `base` with the values of `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged
