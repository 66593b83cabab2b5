"""Fewer experts than ranks that hold the same ones: sharding them still changes no number."""

import pytest
import torch
from small_engine import full, small_engine, train, whole_state
from torch import Tensor

from dmoe.testing import run_distributed

TWO_EXPERTS = {"num_experts": 2}
LAYOUTS = [(ep, stage) for ep in (1, 2) for stage in (2, 3)]


def trained(ep: int, stage: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = small_engine(ep=ep, zero_stage=stage, precision="fp64", moe=TWO_EXPERTS)
    return train(engine, steps=2), whole_state(engine)


def all_layouts() -> list[tuple[list[float], dict[str, Tensor]]]:
    return [trained(*layout) for layout in LAYOUTS]


def test_two_experts_on_four_ranks_equal_one_process() -> None:
    losses, state = trained(1, 0)
    by_layout = run_distributed(all_layouts, 4)[0]
    for layout, (sharded_losses, sharded) in zip(LAYOUTS, by_layout, strict=True):
        assert sharded_losses == pytest.approx(losses, abs=1e-9)
        assert sharded.keys() == state.keys()
        for name, value in state.items():
            error = (sharded[name] - value).abs().max()
            assert error <= 1e-9, f"ep, stage {layout}: {name} is off by {error}"


def held_expert_elements() -> list[int]:
    """Elements of the expert weights, and of one moment of them, that this rank holds."""
    engine = small_engine(zero_stage=3, moe=TWO_EXPERTS)
    weights = [p for name, p in engine.model.named_parameters() if ".experts." in name]
    moments = [engine.optimizer.state[p]["exp_avg"] for p in weights]
    return [sum(t.to_local().numel() for t in group) for group in (weights, moments)]


@pytest.mark.slow
def test_every_rank_holds_an_equal_share_of_two_experts() -> None:
    engine = small_engine(moe=TWO_EXPERTS)
    total = sum(full(p).numel() for n, p in engine.model.named_parameters() if ".experts." in n)
    assert run_distributed(held_expert_elements, 4) == [[total // 4] * 2] * 4
    assert torch.tensor(total) > 0
