"""A resumed run equals one that was never interrupted, bit for bit; and goes on on any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SAVE_EVERY, STEPS, run_tiny, tiny_config

from dmoe.config import ConfigError
from dmoe.testing import run_distributed
from dmoe.trainer.build import open_run

Sections = dict[str, dict[str, Any]]

EXPERTS = {"num_experts": 8, "expert_ffn_dim": 16}
# The range of k widens until after the interruption; and p moves after every step.
ELASTIC: Sections = {"model": {"moe": {**EXPERTS, "elastic": {"k_max": 4, "widen_steps": 5}}}}
TOP_P: Sections = {
    "model": {"moe": {**EXPERTS, "router": {"name": "top_p", "controller": {"target_k": 2}}}}
}
BLOCKS: Sections = {"model": {"moe": {**EXPERTS, "infinite": {"granularity": "block"}}}}
NEURONS: Sections = {"model": {"moe": {**EXPERTS, "infinite": {"latent_dim": 6}}}}
ONE_PROCESS: list[Sections] = [
    {},
    ELASTIC,
    TOP_P,
    BLOCKS,
    {"engine": {"precision": "fp32"}, "train": {"recompute": "full"}},
]
TWO_RANKS: list[Sections] = [
    {},
    {"parallel": {"ep": 2}},
    {"engine": {"zero_stage": 2}},
    {"engine": {"zero_stage": 3}, "parallel": {"ep": 2}},
    {"engine": {"zero_stage": 3}, **NEURONS},
    {
        "parallel": {"ep": 2},
        "engine": {"precision": "bf16", "zero_stage": 2},
        "checkpoint": {"async_save": True},
    },
]
DEEPSPEED: list[Sections] = [
    {
        "engine": {"name": "deepspeed", "zero_stage": stage, "precision": precision},
        "parallel": {"ep": ep},
    }
    for stage, precision, ep in ((3, "fp32", 2), (2, "fp32", 1), (1, "bf16", 2))
]
FOUR_RANKS: list[Sections] = [{"engine": {"zero_stage": 3}, "parallel": {"ep": 2}}]


def _straight_and_resumed(store: Path, folder: Path, sections: dict[str, Any]) -> None:
    """Compare on every rank; one interruption is right after a save, one is two steps later."""
    straight = run_tiny(tiny_config(store, folder / "straight", **sections))
    config = tiny_config(store, folder / "resumed", **sections)
    first, _ = run_tiny(config, die_after=SAVE_EVERY + 2)
    second, state = run_tiny(config)
    assert list(second) == list(range(SAVE_EVERY + 1, STEPS + 1))
    assert {**first, **second} == straight[0]
    assert state.keys() == straight[1].keys()
    different = [name for name in state if not torch.equal(state[name], straight[1][name])]
    assert not different


def _all_layouts(store: Path, folder: Path, layouts: list[Sections]) -> None:
    for index, sections in enumerate(layouts):
        _straight_and_resumed(store, folder / str(index), sections)


def test_resume_equals_a_straight_run_bit_for_bit(token_store, tmp_path) -> None:
    _all_layouts(token_store, tmp_path, ONE_PROCESS)


@pytest.mark.parametrize("layouts", [TWO_RANKS, FOUR_RANKS], ids=["2 ranks", "4 ranks"])
def test_resume_on_several_ranks_too(layouts, token_store, tmp_path) -> None:
    world_size = 2 if layouts is TWO_RANKS else 4
    run_distributed(_all_layouts, world_size, token_store, tmp_path, layouts)


@pytest.mark.parametrize(
    "layouts", [DEEPSPEED[:1], pytest.param(DEEPSPEED[1:], marks=pytest.mark.slow)]
)
def test_resume_under_deepspeed_too(layouts, token_store, tmp_path) -> None:
    run_distributed(_all_layouts, 2, token_store, tmp_path, layouts, timeout=280)


def _train(store: Path, folder: Path, sections: dict[str, Any], die_after: int | None) -> Any:
    rows, state = run_tiny(tiny_config(store, folder, **sections), die_after)
    return rows, {name: tensor.numpy() for name, tensor in state.items()}


def _go_through(
    journey: list[tuple[int, Sections]],
    store: Path,
    folder: Path,
    model: Sections | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Train a step or so on each layout in turn and compare with one process all the way."""
    every = {"checkpoint": {"every": 1}}
    straight, state = _train(store, folder / "straight", {**every, **(model or {})}, None)
    rows: dict[int, Any] = {}
    for stage, (world_size, sections) in enumerate(journey, start=1):
        die_after = stage if stage < len(journey) else None
        arguments = (store, folder / "moved", {**every, **sections}, die_after)
        if world_size == 1:
            new_rows, moved = _train(*arguments)
        else:
            new_rows, moved = run_distributed(_train, world_size, *arguments)[0]
        rows |= new_rows
    assert list(rows) == list(range(1, STEPS + 1))
    for step, row in rows.items():
        assert row["samples"] == straight[step]["samples"]
        assert row["counts"] == straight[step]["counts"]
        assert row["loss"] == pytest.approx(straight[step]["loss"], abs=tolerance)
        assert row["grad_norm"] == pytest.approx(straight[step]["grad_norm"], abs=tolerance)
    for name, value in state.items():
        assert abs(moved[name] - value).max() <= tolerance, name


def test_a_run_goes_on_on_another_layout(token_store, tmp_path) -> None:
    """Moments, bias and the order of data move with it, over stages, ep and number of ranks."""
    stage_3_ep_2: Sections = {"engine": {"zero_stage": 3}, "parallel": {"ep": 2}}
    journey = [(1, {}), (2, stage_3_ep_2), (4, {"parallel": {"ep": 4}}), (1, {})]
    _go_through(journey, token_store, tmp_path)


@pytest.mark.parametrize(
    "varying",
    [ELASTIC, BLOCKS, pytest.param(TOP_P, marks=pytest.mark.slow)],
    ids=["elastic", "infinite", "top_p"],
)
def test_a_varying_run_goes_on_on_another_layout(varying, token_store, tmp_path) -> None:
    """The k of a step, its samples, and the threshold that follows k, do not depend on the rank."""
    journey = [(1, varying), (2, varying | {"parallel": {"ep": 2}})]
    _go_through(journey, token_store, tmp_path, varying)


@pytest.mark.slow
def test_a_run_goes_on_on_many_layouts(token_store, tmp_path) -> None:
    sharded: Sections = {"engine": {"zero_stage": 3}, "parallel": {"ep": 2}}
    gradients: Sections = {"engine": {"zero_stage": 2}, "parallel": {"ep": 2}}
    dense: Sections = {"engine": {"zero_stage": 2}}
    journey = [(4, sharded), (2, gradients), (4, dense), (2, {}), (4, gradients), (1, {})]
    _go_through(journey, token_store, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_under_another_engine(token_store, tmp_path) -> None:
    """ZeRO 2 with ep 2 to native stage 3 with ep 4, and back, moments included."""
    fp32: Sections = {"engine": {"precision": "fp32"}}
    zero_2, zero_3, native_3 = (
        {"engine": {"name": name, "zero_stage": stage, "precision": "fp32"}}
        for name, stage in (("deepspeed", 2), ("deepspeed", 3), ("native", 3))
    )
    ep_2, ep_4 = ({"parallel": {"ep": ep}} for ep in (2, 4))
    journey = [
        (2, zero_2 | ep_2),
        (4, native_3 | ep_4),
        (2, zero_3 | ep_2),
        (4, zero_2 | ep_4),
        (1, fp32),
    ]
    _go_through(journey, token_store, tmp_path, fp32, tolerance=1e-5)


def test_a_finished_run_stays_as_it_is(token_store, tmp_path) -> None:
    config = tiny_config(token_store, tmp_path)
    _, state = run_tiny(config)
    rows, again = run_tiny(config)
    assert rows == {}
    assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_heads": 4}}, r"model\.num_heads was 2 .* and is now 4"),
        ({"run": {"seed": 2}}, r"run\.seed was 1 .* now 2"),
        ({"train": {"seq_len": 16}}, r"train\.seq_len was 32 .* now 16"),
        ({"checkpoint": {"resume": "never"}}, "already holds checkpoints"),
    ],
)
def test_what_cannot_change_on_resume(sections, message, token_store, tmp_path) -> None:
    config = tiny_config(token_store, tmp_path)
    run_tiny(config, die_after=SAVE_EVERY)
    tree = config.model_dump(mode="json")
    for name, section in sections.items():
        tree[name] |= section
    with pytest.raises(ConfigError, match=message):
        run_tiny(type(config).model_validate(tree))


def test_a_folder_has_one_run_at_a_time(token_store, tmp_path) -> None:
    config = tiny_config(token_store, tmp_path)
    device = torch.device("cpu")
    with (
        open_run(config, device),
        pytest.raises(ConfigError, match=r"another process is training in .*tiny"),
        open_run(config, device),
    ):
        pass
    with open_run(config, device):
        pass


def test_starting_from_another_run(token_store, tmp_path) -> None:
    """A run folder is as good as a checkpoint folder; a folder that is neither is bad input."""
    source = tiny_config(token_store, tmp_path / "source")
    run_tiny(source, die_after=SAVE_EVERY)
    start = {"resume_from": str(source.run.folder)}
    rows, _ = run_tiny(tiny_config(token_store, tmp_path / "next", checkpoint=start))
    assert min(rows) == SAVE_EVERY + 1
    nowhere = tiny_config(token_store, tmp_path / "other", checkpoint={"resume_from": "/nowhere"})
    with pytest.raises(
        ConfigError, match="/nowhere is neither a checkpoint folder nor a run folder"
    ):
        run_tiny(nowhere)


def test_the_range_of_k_may_change_on_resume_but_not_what_gates_mean(token_store, tmp_path) -> None:
    config = tiny_config(token_store, tmp_path)
    run_tiny(config, die_after=SAVE_EVERY)
    tree = config.model_dump(mode="json")
    tree["model"]["moe"]["elastic"] = {"k_min": 2, "k_max": 5, "normalize": False}
    with pytest.raises(ConfigError, match=r"model\.moe\.elastic\.normalize was None .* now False"):
        run_tiny(type(config).model_validate(tree))
    del tree["model"]["moe"]["elastic"]["normalize"]
    rows, _ = run_tiny(type(config).model_validate(tree))
    assert min(rows) == SAVE_EVERY + 1


def test_the_selection_bias_may_be_switched_off_on_resume(token_store, tmp_path) -> None:
    config = tiny_config(token_store, tmp_path)
    run_tiny(config, die_after=SAVE_EVERY)
    tree = config.model_dump(mode="json")
    tree["model"]["moe"]["router"]["bias_update_rate"] = 0.0
    rows, _ = run_tiny(type(config).model_validate(tree))
    assert min(rows) == SAVE_EVERY + 1
