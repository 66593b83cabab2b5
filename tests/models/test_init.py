"""Initial weights come from the seed and the names; no layout changes them."""

import math

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dmoe.models import DecoderLM, ModelConfig, build_model, init_weights
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

# Six experts on ep 2 and four ranks: their shards are uneven, and one router shard is empty.
CONFIG = ModelConfig(
    vocab_size=19,
    dim=16,
    num_layers=2,
    ffn_dim=40,
    moe={
        "num_experts": 6,
        "expert_ffn_dim": 8,
        "num_dense_layers": 1,
        "router": {"name": "top_k", "bias_update_rate": 0.001},
    },
)


def weights_of(model: DecoderLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_seed_decides() -> None:
    first, again, other = (weights_of(build_model(CONFIG, seed=seed)) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, other[name]) == (weight.ndim == 1)


def test_no_two_matrices_and_no_two_experts_are_alike() -> None:
    weights = weights_of(build_model(CONFIG))
    matrices = [
        matrix
        for name, weight in weights.items()
        if weight.ndim > 1
        for matrix in (weight if ".experts." in name else [weight])
    ]
    starts = {tuple((m.flatten()[:4] / m.std()).tolist()) for m in matrices}
    assert len(starts) == len(matrices)


def test_scaled_initialisation_goes_by_the_inputs() -> None:
    """Switch: standard deviation sqrt(s / inputs), nothing beyond two of them."""
    config = ModelConfig.model_validate(
        {**CONFIG.model_dump(), "dim": 64, "ffn_dim": 256, "vocab_size": 500, "init_scale": 0.1}
    )
    for name, weight in weights_of(build_model(config)).items():
        if weight.ndim == 1:
            continue
        if name.startswith("embed."):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
            continue
        std = math.sqrt(0.1 / weight.shape[-1])
        assert weight.abs().max() <= 2 * std, name
        assert weight.abs().max() > 1.9 * std or weight.numel() < 500, name
        # A normal distribution that is cut at two deviations has 0.88 of its deviation left.
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.1), name


def test_sizes_are_those_of_gpt2() -> None:
    config = ModelConfig(family="gpt2", dim=64, num_layers=8, ffn_dim=256, moe=None)
    for name, weight in weights_of(build_model(config)).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif weight.ndim > 1:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            assert torch.equal(weight, torch.full_like(weight, value)), name
    experts = build_model(CONFIG).moe_layers[0]
    assert experts.experts.w_gate_up_E2FD.std().item() == pytest.approx(0.02, rel=0.05)
    assert experts.experts.w_down_EDF.std().item() == pytest.approx(0.01, rel=0.05)
    assert not experts.router.expert_bias_E.any()


def test_every_precision_starts_from_one_model() -> None:
    narrow, wide = (
        weights_of(build_model(CONFIG, compute_dtype=dtype))
        for dtype in (torch.bfloat16, torch.float64)
    )
    for name, weight in wide.items():
        assert weight.dtype == torch.float64
        assert torch.equal(weight, narrow[name].double())


def test_the_meta_device_holds_shapes_alone() -> None:
    huge = ModelConfig(
        dim=8192,
        num_layers=64,
        num_heads=64,
        vocab_size=128_000,
        moe={"num_experts": 128, "expert_ffn_dim": 8192},
    )
    model = build_model(huge, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) > 1e12


def my_share(weights: dict[str, torch.Tensor], dims: ParallelDims) -> dict[str, torch.Tensor]:
    held = dims.local_experts(6)
    return {
        name: weight[held.start : held.stop] if ".experts." in name else weight
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("ep", [2, 3, 6])
def test_expert_parallel_ranks_hold_shares_of_one_model(ep) -> None:
    expected = weights_of(build_model(CONFIG, seed=5))
    for rank in range(ep):
        dims = ParallelDims(world_size=ep, rank=rank, ep=ep)
        weights, mine = weights_of(build_model(CONFIG, dims=dims, seed=5)), my_share(expected, dims)
        assert weights.keys() == mine.keys()
        assert all(torch.equal(weight, mine[name]) for name, weight in weights.items())


def _compare_shards_with_one_process() -> None:
    dims = ParallelDims.create(ep=2)
    assert dims.expert_mesh is not None
    model = build_model(CONFIG, dims=dims, device="meta")
    for layer in model.moe_layers:
        fully_shard(layer.experts, mesh=dims.expert_mesh["edp"])
    fully_shard(model, mesh=dims.dense_mesh)
    model.to_empty(device="cpu")
    init_weights(model, seed=5, dims=dims)
    mine = my_share(weights_of(build_model(CONFIG, seed=5)), dims)
    for name, weight in weights_of(model).items():
        assert isinstance(weight, DTensor)
        assert torch.equal(weight.full_tensor(), mine[name]), name


def test_sharding_changes_no_weight() -> None:
    run_distributed(_compare_shards_with_one_process, 4)
