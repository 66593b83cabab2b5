"""Profiles: written, read back, checked against the model that is to use them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from dmoe.config.base import ConfigError
from dmoe.models import ModelConfig
from dmoe.models.k_profile import Budget, KProfile, SearchedOn, load_k_profile

MODEL = ModelConfig.model_validate(
    {"num_layers": 3, "moe": {"num_experts": 4, "expert_ffn_dim": 8, "num_dense_layers": 1}}
)
PROFILE = KProfile(
    k=(4, 1),
    budget=Budget(unit="latency", size=0.125, cost=0.1),
    searched_on=SearchedOn(checkpoint="runs/x", step=7, num_targets=99, loss=1.5),
)


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "k_profile.yaml")
    assert load_k_profile(tmp_path / "k_profile.yaml", MODEL) == PROFILE


def test_a_profile_by_hand_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "k_profile.yaml"
    path.write_text("k: [2, 3]\n")
    assert load_k_profile(path, MODEL) == KProfile(k=(2, 3))


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("k: [1, 2, 3]", ["has 3 numbers", "2 MoE layers"]),
        ("k: [4]", ["has 1 numbers", "2 MoE layers"]),
        ("k: [1, 5]", ["k = 5", "num_experts = 4"]),
        ("k: [1, 0]", ["k.1", "greater than 0"]),
        ("k: []", ["at least 1 item"]),
        ("k: [1, 1.5]", ["k.1"]),
        ("k: 2", ["k"]),
        ("kk: [1, 2]", ["kk", "unknown key"]),
        ("k: [1, 2]\nbudget: {unit: dollars, size: 1, cost: 1}", [":2:", "budget.unit"]),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(text: str, facts: list, tmp_path: Path) -> None:
    path = tmp_path / "k_profile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_k_profile(path, MODEL)
    for fact in [str(path), *facts]:
        assert fact in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_k_profile(tmp_path / "nowhere.yaml", MODEL)


def test_a_dense_model_takes_none(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "k_profile.yaml")
    with pytest.raises(ConfigError, match="dense"):
        load_k_profile(tmp_path / "k_profile.yaml", ModelConfig())


def test_no_profile_has_no_expert() -> None:
    with pytest.raises(ValidationError):
        KProfile(k=(0,))
