"""Presets against published sizes, and memory against what an engine really holds."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dmoe.config import ConfigError, load_config
from dmoe.engine import NativeEngine
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed
from dmoe.trainer.config import Config
from dmoe.trainer.estimate import estimate
from dmoe.trainer.memory import Memory

PRESETS = Path(__file__).parents[2] / "configs"
BILLION = 1e9

# Totals are those of the released weights; active parameters are published to two digits.
PUBLISHED = {
    "gpt2_small": (124_439_808, 0.124),
    "gpt2_medium": (354_823_168, 0.355),
    "mixtral_8x7b": (46_702_792_704, 12.9),
    "olmoe_1b_7b": (6_919_161_856, 1.3),
    "qwen3_30b_a3b": (30_532_122_624, 3.3),
    "deepseek_moe_16b": (16_375_728_128, 2.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    total, active = PUBLISHED[name]
    result = estimate(load_config(PRESETS / f"{name}.yaml"))
    assert result.num_params == total
    assert result.num_active_params / BILLION == pytest.approx(active, rel=0.02)


def test_switch_preset_is_as_active_as_its_dense_twin() -> None:
    switch = estimate(load_config(PRESETS / "switch_base_8.yaml"))
    dense = estimate(load_config(PRESETS / "gpt2_small.yaml"))
    assert switch.num_active_params == pytest.approx(dense.num_active_params, rel=1e-3)
    assert switch.num_params - switch.num_active_params == 6 * 7 * 2 * 768 * 3072


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_folder_can_be_estimated(path: Path) -> None:
    config = load_config(path)
    assert path.stem == "base_large" or config.run.name == path.stem
    tree = json.loads(json.dumps(estimate(config).to_json()))
    assert tree["memory"]["total"] == sum(
        size for kind, size in tree["memory"].items() if kind != "total"
    )


SMALL = {
    "model": {
        "vocab_size": 257,
        "dim": 32,
        "num_layers": 4,
        "num_heads": 2,
        "ffn_dim": 75,
        "max_seq_len": 64,
        "moe": {
            "every": 2,
            "num_experts": 6,
            "expert_ffn_dim": 24,
            "num_shared_experts": 1,
            "router": {"name": "top_k", "top_k": 2},
        },
    },
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "seq_len": 64},
}


def small(*, ep: int = 1, recompute: str = "none", **engine: object) -> Config:
    train = SMALL["train"] | {"recompute": recompute}
    sections = SMALL | {"parallel": {"ep": ep}, "engine": engine, "train": train}
    return Config.model_validate(sections)


LAYOUTS = [
    {"ep": ep, "zero_stage": stage, "precision": precision}
    for ep in (1, 2)
    for stage, precision in ((0, "fp32"), (2, "bf16"), (3, "fp64"))
]


def held_bytes() -> list[tuple[int, int]]:
    """Return what the parameters and the moments of an engine of each layout take on this rank."""
    sizes = []
    for layout in LAYOUTS:
        config = small(**layout)
        engine = NativeEngine(
            config.engine,
            model=config.model,
            optim=config.optim,
            dims=ParallelDims.create(ep=config.parallel.ep),
            device=torch.device("cpu"),
            seed=0,
        )
        states = engine.optimizer.state.values()
        moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
        sizes.append((local_bytes(engine.model.parameters()), local_bytes(moments)))
    return sizes


def local_bytes(tensors: object) -> int:
    locals_ = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum(tensor.nbytes for tensor in locals_)


@pytest.mark.slow
def test_weights_and_moments_are_what_the_fullest_rank_holds() -> None:
    by_rank = run_distributed(held_bytes, 2)
    for index, layout in enumerate(LAYOUTS):
        memory = estimate(small(**layout), world_size=2).memory
        fullest = max(sizes[index] for sizes in by_rank)
        assert (memory.parameters, memory.optimizer) == fullest, layout


def memory(world_size: int = 1, **choices: object) -> Memory:
    return estimate(small(**choices), world_size).memory


def test_sharding_divides_what_each_stage_shards() -> None:
    whole, sharded = (memory(4, zero_stage=stage) for stage in (0, 2))
    assert whole.optimizer == 2 * whole.parameters
    assert whole.gradients == whole.parameters
    assert 3.5 < whole.optimizer / sharded.optimizer <= 4
    assert memory(4, zero_stage=3).parameters == sharded.parameters
    # Stage 2 keeps the gathered weights from the forward to the backward pass, stage 3 does not.
    assert sharded.compute_weights == whole.parameters
    assert memory(4, zero_stage=3).compute_weights < sharded.compute_weights


def test_expert_parallelism_divides_the_experts_alone() -> None:
    experts = estimate(small()).params_by_kind["experts"]
    assert memory(2).parameters - memory(2, ep=2).parameters == 4 * experts // 2


def test_more_owners_than_experts_cut_each_expert() -> None:
    """Mixtral with ep 8 has one expert a rank, and 8 ranks for it: each holds an eighth of it."""
    config = load_config(PRESETS / "mixtral_8x7b.yaml")
    result = estimate(config, 64)
    dense = result.num_params - result.params_by_kind["experts"]
    exact = 4 * (result.params_by_kind["experts"] + dense) / 64
    assert exact <= result.memory.parameters < 1.001 * exact


def test_bfloat16_holds_a_copy_of_the_matrices_unless_recomputed() -> None:
    assert memory(precision="fp32").compute_weights == 0
    kept = memory(precision="bf16").compute_weights
    again = memory(precision="bf16", recompute="full").compute_weights
    embedding = 257 * 32
    assert kept == 2 * (estimate(small()).num_params - embedding)
    assert 2 * embedding < again < kept


def test_step_counts() -> None:
    result = estimate(small(), world_size=2)
    assert result.tokens_per_step == 8 * 64
    assert result.grad_accum_steps == 2
    assert result.layout.startswith("world 2 = edp 2 x ep 1")


@pytest.mark.parametrize("world_size", [3, 8])
def test_ranks_that_cannot_share_the_work_are_refused(world_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"ranks, {world_size}|{world_size} ranks"):
        estimate(small(ep=2), world_size)


def test_table_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    result = estimate(load_config(PRESETS / "qwen3_30b_a3b.yaml"))
    Console(width=100).print(result.render())
    shown = capsys.readouterr().out
    assert result.layout in shown
    for text in ("30,532,122,624", "3,353,032,704", "compute weights", "FLOPs a token"):
        assert text in shown
