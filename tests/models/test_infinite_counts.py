"""Counts of continuous experts: by arithmetic, by the products that run, by what autograd saves."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmoe.config import load_config
from dmoe.models import ModelConfig, ModelInputs, build_model
from dmoe.models.counts import (
    activations,
    flops_per_token,
    num_active_params,
    num_params,
    params_by_kind,
)
from dmoe.moe import BatchTotals, MoEContext

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"vocab_size": 96, "dim": 64, "num_layers": 3, "num_heads": 4, "ffn_dim": 160}
NEURON = {"ffn_dim": 256, "latent_dim": 16}
BLOCK = NEURON | {"granularity": "block", "block_size": 16}


def model(infinite: dict, family: str = "llama", **moe) -> ModelConfig:
    return ModelConfig.model_validate(
        SIZES | {"family": family, "moe": {"num_dense_layers": 1, "infinite": infinite, **moe}}
    )


def test_gpt2_small_has_the_parameters_of_the_paper() -> None:
    """129M active of 186M (arXiv 2601.17680), and by hand what they are."""
    config = load_config(CONFIGS / "infinite_gpt2_small.yaml").model
    assert round(num_params(config) / 1e6) == 186
    assert round(num_active_params(config) / 1e6) == 129
    counts = params_by_kind(config)
    assert counts["neurons"] == 12 * 2 * 768 * 6144
    assert counts["space"] == 12 * 6144 * 52
    assert counts["router"] == 12 * 2 * 52 * (768 + 1)
    # Two samples of a quarter each use half the neurons at most.
    assert num_params(config) - num_active_params(config) == counts["neurons"] // 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameters_by_hand(family) -> None:
    maps = 3 if family == "llama" else 2
    counts = params_by_kind(model(NEURON, family))
    assert counts["neurons"] == 2 * maps * 64 * 256
    assert counts["space"] == 2 * 256 * 16
    assert counts["router"] == 2 * 2 * 16 * (64 + 1)
    counts = params_by_kind(model(BLOCK, family))
    assert counts["experts"] == 2 * maps * 64 * 256
    assert counts["space"] == 2 * 16 * 16
    deep = params_by_kind(model(NEURON | {"deep": {"layers": 3}}, family))
    assert deep["deeper_neurons"] == 2 * 2 * (maps - 1) * 256 * 256
    assert deep["space"] == 2 * 3 * 256 * 16


@pytest.mark.parametrize("infinite", [NEURON, BLOCK])
@pytest.mark.parametrize(("samples", "used"), [(1, 0.25), (2, 0.5), (3, 0.75), (8, 1.0)])
def test_a_token_uses_what_its_samples_may_use(infinite, samples, used) -> None:
    config = model(infinite | {"samples": samples})
    counts = params_by_kind(config)
    neurons = counts.get("neurons", 0) + counts.get("experts", 0)
    assert num_params(config) - num_active_params(config) == (1 - used) * neurons


CASES = [
    NEURON,
    NEURON | {"samples": 1},
    NEURON | {"mask": "hard", "samples": 3},
    NEURON | {"mask_position": "pre_activation"},
    NEURON | {"deep": {"layers": 2}},
    # A block for every sample, all of them used.
    BLOCK | {"active_fraction": 1.0},
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("infinite", CASES)
def test_flops_are_those_of_the_matrix_products(infinite, family) -> None:
    config = model(infinite, family)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network = build_model(config, compute_dtype=torch.float64).double()
        network(ModelInputs(torch.zeros(2, 32, dtype=torch.int64)))
    assert flops_per_token(config, 32, training=False) == counter.get_total_flops() / 64


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("infinite", [*CASES[:5], BLOCK | {"active_fraction": 1.0, "samples": 1}])
def test_kept_bytes_are_what_autograd_saves(infinite, family) -> None:
    config = model(infinite, family)
    batch, seq_len = 2, 128
    num_tokens = batch * seq_len
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    totals = BatchTotals(num_tokens, num_tokens, batch, 1)
    context = MoEContext(seq_len, token_ids_T=torch.arange(num_tokens), totals=totals)
    net = build_model(config)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        net(ModelInputs(torch.zeros(batch, seq_len, dtype=torch.int64)), context)
    for parameter in net.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    angles = (batch, 1, seq_len, config.width_of_head)
    sizes = [t.untyped_storage().nbytes() for t in saved.values() if t.shape != angles]
    # Samples, masks and indices are narrower than this, all that is counted is wider.
    measured = sum(size for size in sizes if size > num_tokens * 48 * 4)
    expected = activations(
        config,
        num_tokens=num_tokens,
        seq_len=seq_len,
        dtype=torch.float32,
        recompute="none",
        masked=False,
        exchanged=False,
    )
    assert measured == expected.kept
