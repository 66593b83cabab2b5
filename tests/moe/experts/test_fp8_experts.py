"""Experts in eight bits as a choice in the config: what it asks of the rest, and what it does."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dmoe.config.base import ConfigError
from dmoe.models import ModelConfig
from dmoe.moe import MoEConfig, MoEContext, MoELayer
from dmoe.moe.routing import BatchTotals
from dmoe.ops.backend import resolve_backend

MOE: dict[str, Any] = {"num_experts": 4, "expert_ffn_dim": 128, "expert_dtype": "fp8"}
TOKENS, DIM = 6, 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_ffn_dim": 96}, "expert_ffn_dim = 96 is no multiple of 128"),
        ({"backend": "megablocks"}, "choose triton, torch or loop"),
        ({"expert_dropout": 0.1}, "expert_dropout = 0.1"),
        ({"router": {"name": "soft_moe"}}, "leave expert_dtype out"),
        ({"infinite": {"granularity": "neuron"}}, "leave expert_dtype out"),
        (
            {"infinite": {"granularity": "block", "block_size": 64}},
            "infinite.block_size = 64 is no multiple of 128",
        ),
        ({"expert_dtype": "int8"}, "expert_dtype"),
    ],
)
def test_what_does_not_go_with_it_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        MoEConfig.model_validate(MOE | options)


def test_the_width_of_the_model_is_a_multiple_of_128() -> None:
    with pytest.raises((ConfigError, ValidationError), match="dim = 192 is no multiple of 128"):
        ModelConfig.model_validate({"dim": 192, "num_heads": 2, "moe": MOE})
    ModelConfig.model_validate({"dim": 256, "num_heads": 2, "moe": MOE})


def test_blocks_of_a_continuous_space_may_be_in_eight_bits() -> None:
    infinite = {"granularity": "block", "ffn_dim": 512, "block_size": 128}
    config = MoEConfig.model_validate({"infinite": infinite, "expert_dtype": "fp8"})
    layer = config.build(dim=DIM, activation="gelu")
    assert layer.experts.dtype == "fp8"


@pytest.mark.parametrize(
    ("capability", "hip", "is_there"),
    [((9, 0), None, True), ((8, 0), None, False), ((10, 0), None, False), ((9, 4), "6.4", False)],
)
def test_the_kernels_need_their_tensor_cores(monkeypatch, capability, hip, is_there) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr("dmoe.ops.backend._is_installed", lambda *packages: True)
    gpu, narrow = torch.device("cuda"), torch.bfloat16
    assert resolve_backend("triton", gpu, narrow) == "triton"
    assert resolve_backend("torch", gpu, narrow, "fp8") == "torch"
    if is_there:
        assert resolve_backend("triton", gpu, narrow, "fp8") == "triton"
        return
    with pytest.raises(ConfigError, match=r"this device is some GPU.*expert_dtype to same"):
        resolve_backend("triton", gpu, narrow, "fp8")


def test_a_layer_differs_by_the_rounding_alone() -> None:
    outputs = []
    for dtype in ("same", "fp8"):
        torch.manual_seed(0)
        layer = MoELayer(MoEConfig.model_validate(MOE | {"expert_dtype": dtype}), dim=DIM)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        totals = BatchTotals(TOKENS, TOKENS, 1, 1)
        context = MoEContext(TOKENS, token_ids_T=torch.arange(TOKENS), totals=totals)
        outputs.append(layer(torch.randn(TOKENS, DIM), context)[0])
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 1e-2 < error < 0.1
