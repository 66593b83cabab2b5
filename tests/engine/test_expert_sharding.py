"""Experts that do not come out even over the ranks that share them: no number changes."""

import pytest
from small_engine import full, small_engine, train, whole_state
from torch import Tensor

from dmoe.testing import run_distributed

Trained = tuple[list[float], dict[str, Tensor]]
Layout = tuple[int, int]  # ep, stage


def trained(num_experts: int, layouts: list[Layout]) -> list[Trained]:
    results = []
    for ep, stage in layouts:
        moe = {"num_experts": num_experts}
        engine = small_engine(ep=ep, zero_stage=stage, precision="fp64", moe=moe)
        results.append((train(engine, steps=2), whole_state(engine)))
    return results


@pytest.mark.parametrize(
    ("world_size", "num_experts", "layouts"),
    [
        (2, 3, [(1, 3)]),
        pytest.param(4, 2, [(1, 2), (1, 3), (2, 2), (2, 3)], marks=pytest.mark.slow),
    ],
)
def test_equals_one_process(world_size: int, num_experts: int, layouts: list[Layout]) -> None:
    [(losses, state)] = trained(num_experts, [(1, 0)])
    by_layout = run_distributed(trained, world_size, num_experts, layouts)[0]
    for layout, (sharded_losses, sharded) in zip(layouts, by_layout, strict=True):
        assert sharded_losses == pytest.approx(losses, abs=1e-9)
        assert sharded.keys() == state.keys()
        for name, value in state.items():
            error = (sharded[name] - value).abs().max()
            assert error <= 1e-9, f"ep, stage {layout}: {name} is off by {error}"


def held_expert_elements() -> list[int]:
    """Elements of the expert weights, and of one moment of them, that this rank holds."""
    engine = small_engine(zero_stage=3, moe={"num_experts": 2})
    weights = [p for name, p in engine.model.named_parameters() if ".experts." in name]
    moments = [engine.optimizer.state[p]["exp_avg"] for p in weights]
    return [sum(t.to_local().numel() for t in group) for group in (weights, moments)]


@pytest.mark.slow
def test_every_rank_holds_an_equal_share_of_two_experts() -> None:
    model = small_engine(moe={"num_experts": 2}).model
    total = sum(full(p).numel() for name, p in model.named_parameters() if ".experts." in name)
    assert run_distributed(held_expert_elements, 4) == [[total // 4] * 2] * 4
