"""Bad input is refused with the numbers, and the widths follow from what is given."""

import pytest
from pydantic import ValidationError

from dmoe.moe import MoEConfig

NEURON = {"ffn_dim": 64}
BLOCK = {"granularity": "block", "ffn_dim": 64, "block_size": 8}
MIXTURE = {"name": "mixture", "components": 3}


def config(infinite: dict, **moe) -> MoEConfig:
    return MoEConfig.model_validate({"infinite": infinite, **moe})


@pytest.mark.parametrize(
    ("infinite", "moe", "message"),
    [
        (NEURON | {"active_fraction": 0.005}, {}, r"0\.005 of 64 neurons.* 0\.32 .*0\.0078125"),
        (BLOCK | {"active_fraction": 0.05}, {}, r"0\.05 of 8 blocks of 8 neurons.* 0\.4 "),
        (NEURON | {"deep": {"fractions": [0.5, 0.001]}}, {}, r"0\.001 of 64 neurons"),
        (NEURON | {"active_fraction": 0}, {}, "greater than 0"),
        (NEURON | {"active_fraction": 1.5}, {}, "less than or equal to 1"),
        (BLOCK | {"block_size": 24}, {}, r"block_size = 24 does not divide .* = 64"),
        (BLOCK | {"block_size": None}, {}, r"block_size is missing.* = 64"),
        (NEURON | {"block_size": 8}, {}, r"block_size = 8, but granularity = neuron"),
        (NEURON | {"samples": 0}, {}, "greater than 0"),
        (NEURON | {"inference_samples": 0}, {}, "greater than 0"),
        (
            NEURON | {"inference": "mean", "router": MIXTURE},
            {},
            r"mean.*components = 3.*router\.mean",
        ),
        (NEURON | {"deep": {"mean_after_first": True}, "router": MIXTURE}, {}, r"mean_after_first"),
        (NEURON | {"inference": "mean", "inference_samples": 4}, {}, r"inference_samples = 4"),
        (
            NEURON | {"router": {"name": "gaussian", "log_variance_min": 5.0}},
            {},
            r"= 5\.0 is not below .* = 4\.0",
        ),
        (BLOCK | {"mask_position": "pre_activation"}, {}, "pre_activation"),
        (BLOCK | {"deep": {}}, {}, r"deep\.layers = 2, but granularity = block"),
        (NEURON | {"deep": {"fractions": [0.5]}}, {}, r"has 1 numbers for deep\.layers = 2"),
        (NEURON | {"deep": {"fractions": [0.5, 2]}}, {}, r"holds 2\.0"),
        ({"ffn_dim": 60}, {}, r"60 is not a multiple of 8"),
        ({}, {"num_experts": 4}, r"num_experts = 4 x expert_ffn_dim = None"),
        (NEURON, {"num_shared_experts": 2}, r"num_shared_experts \(2\)"),
        (NEURON, {"backend": "megablocks"}, r"backend \(megablocks\)"),
        (NEURON, {"capacity": {"factor": 1.5}}, r"capacity \(factor 1\.5\)"),
        (NEURON, {"losses": {"load_balance_weight": 0.1}}, r"losses \(load_balance 0\.1\)"),
        (BLOCK, {"elastic": {"k_max": 2}}, r"elastic draws from 1 to 2"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(infinite, moe, message) -> None:
    with pytest.raises(ValidationError, match=message):
        config(infinite, **moe)


def test_experts_are_needed_without_a_space() -> None:
    with pytest.raises(ValidationError, match="num_experts is missing"):
        MoEConfig.model_validate({"expert_ffn_dim": 8})


def test_the_space_is_that_of_the_experts_where_it_has_no_width() -> None:
    experts = {"num_experts": 16, "expert_ffn_dim": 96}
    neuron, block = config({}, **experts), config({"granularity": "block"}, **experts)
    assert (neuron.space_width, neuron.num_shards) == (1536, 0)
    assert (block.experts, block.expert_width, block.num_shards) == (16, 96, 16)
    assert config(BLOCK, **experts).experts == 8


def test_active_is_what_the_samples_use_at_most() -> None:
    assert config(NEURON).mean_k(1) == 2 * 16
    assert config(NEURON | {"samples": 8}).mean_k(1) == 64
    assert config(BLOCK).mean_k(1) == 2 * 2
    # Two layers of half the neurons each: two samples use all of both.
    assert config(NEURON | {"deep": {}}).mean_k(1) == 128


def test_no_balance_loss_unless_it_is_given() -> None:
    assert config(BLOCK).losses.weights() == {}
    assert config(BLOCK, losses={"load_balance_weight": 0.1}).losses.weights() == {
        "load_balance": 0.1
    }
