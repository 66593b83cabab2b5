"""Counts against arithmetic on the configuration, and kept bytes against what autograd saves."""

from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmoe.models import ModelConfig, ModelInputs, Recompute, build_model, lm_loss
from dmoe.models.counts import (
    activations,
    flops_per_token,
    num_active_params,
    num_params,
    params_by_kind,
)

MOE = {"num_experts": 8, "expert_ffn_dim": 48, "router": {"name": "top_k", "top_k": 3}}
SIZES = {"vocab_size": 96, "dim": 64, "num_heads": 4, "ffn_dim": 160, "max_seq_len": 128}
CONFIGS = [
    ModelConfig.model_validate(SIZES | {"num_layers": 3} | family | moe | {"tie_embeddings": tied})
    for family, moe, tied in product(
        [
            {"family": "gpt2"},
            {"family": "llama"},
            {"family": "llama", "num_kv_heads": 2, "head_dim": 24},
            {"family": "llama", "qk_norm": "head"},
            {"family": "llama", "num_kv_heads": 2, "qk_norm": "vector"},
        ],
        [
            {},
            {"moe": MOE},
            {"moe": MOE | {"every": 2, "num_shared_experts": 2}},
            {"moe": MOE | {"num_dense_layers": 1}},
        ],
        [False, True],
    )
]

# What changes the bytes that are kept, and nothing else.
KEEPING = ModelConfig.model_validate(
    SIZES | {"num_layers": 2, "moe": MOE | {"recompute_experts": True, "dispatch_dtype": "fp8"}}
)


def by_arithmetic(config: ModelConfig) -> dict[str, int]:
    """Count from the sizes alone, the way a paper would."""
    dim, layers, is_gpt2 = config.dim, config.num_layers, config.family == "gpt2"
    queries = config.num_heads * config.width_of_head
    keys = config.kv_heads * config.width_of_head
    maps = 2 if is_gpt2 else 3
    moe_layers = len(config.moe_layers)
    attention = dim * (queries + 2 * keys) + queries * dim
    attention += queries + 2 * keys + dim if is_gpt2 else 0
    ffn = maps * dim * config.ffn_dim + (config.ffn_dim + dim if is_gpt2 else 0)
    qk_norms = {"none": 0, "head": 2 * config.width_of_head, "vector": queries + keys}
    norms = (2 * layers + 1) * dim * (2 if is_gpt2 else 1) + layers * qk_norms[config.qk_norm]
    counts = {
        "embedding": (config.vocab_size + (config.max_seq_len if is_gpt2 else 0)) * dim,
        "output": 0 if config.tie_embeddings else config.vocab_size * dim,
        "attention": layers * attention,
        "dense_ffn": (layers - moe_layers) * ffn,
        "norms": norms,
    }
    if config.moe is not None:
        expert = maps * dim * config.moe.expert_ffn_dim
        counts |= {
            "experts": moe_layers * config.moe.num_experts * expert,
            "shared_experts": moe_layers * config.moe.num_shared_experts * expert,
            "router": moe_layers * config.moe.num_experts * dim,
        }
    return {kind: count for kind, count in counts.items() if count}


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_those_that_arithmetic_gives(config: ModelConfig) -> None:
    expected = by_arithmetic(config)
    assert params_by_kind(config) == expected
    assert num_params(config) == sum(expected.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_token_uses_k_of_the_experts(config: ModelConfig) -> None:
    experts = by_arithmetic(config).get("experts", 0)
    idle = num_params(config) - num_active_params(config)
    assert idle == experts * 5 // 8
    assert num_params(config) - num_active_params(config, k=1) == experts * 7 // 8
    assert num_active_params(config, k=8) == num_params(config)


@pytest.mark.parametrize(
    ("choices", "mean_k", "largest_k"),
    [
        ({"elastic": {"k_max": 6}}, 3.5, 6),
        ({"elastic": {"k_max": 6, "widen_steps": 100}}, 3.5, 6),
        ({"elastic": {"k_max": 6, "budget": 8}}, 8 / 3, 6),
        ({"router": {"name": "top_p", "controller": {"target_k": 2.5}}}, 2.5, 2.5),
        ({"router": {"name": "top_p", "max_k": 4}}, 4, 4),
    ],
)
def test_a_number_of_experts_that_varies_counts_with_its_mean(choices, mean_k, largest_k) -> None:
    """And what is kept for the backward pass with the most that a micro-batch can have."""
    varying = ModelConfig.model_validate(SIZES | {"num_layers": 3, "moe": MOE | choices})
    fixed = ModelConfig.model_validate(SIZES | {"num_layers": 3, "moe": MOE})
    assert num_active_params(varying) == num_active_params(fixed, k=mean_k)
    per_expert = flops_per_token(fixed, 32, k=1) - flops_per_token(fixed, 32, k=0)
    expected = flops_per_token(fixed, 32, k=0) + mean_k * per_expert
    assert flops_per_token(varying, 32) == pytest.approx(expected, abs=3)

    def kept(config: ModelConfig) -> float:
        sizes = {"num_tokens": 2, "seq_len": 32, "dtype": torch.float32, "recompute": "none"}
        return activations(config, **sizes, masked=False, exchanged=True).kept

    one_more = MOE | {"router": {"name": "top_k", "top_k": 4}}
    slope = kept(ModelConfig.model_validate(SIZES | {"num_layers": 3, "moe": one_more}))
    slope -= kept(fixed)
    assert kept(varying) == pytest.approx(kept(fixed) + (largest_k - 3) * slope, rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_flops_are_those_of_the_matrix_products(config: ModelConfig) -> None:
    # The plain attention and the loop over experts in float64 run products that the counter knows.
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = build_model(config, compute_dtype=torch.float64).double()
        model(ModelInputs(torch.zeros(2, 32, dtype=torch.int64)))
    assert flops_per_token(config, 32, training=False) == counter.get_total_flops() / 64
    assert flops_per_token(config, 32) == 3 * flops_per_token(config, 32, training=False)


@pytest.mark.parametrize("config", [*CONFIGS[::2], KEEPING])
@pytest.mark.parametrize(
    ("recompute", "masked"),
    [("none", False), ("none", True), ("selective", False), ("full", False)],
)
def test_kept_bytes_are_what_autograd_saves(
    config: ModelConfig, recompute: Recompute, masked: bool
) -> None:
    batch, seq_len = 2, 128
    num_tokens = batch * seq_len
    documents = (torch.arange(seq_len) > 50).long().expand(batch, seq_len) if masked else None
    inputs = ModelInputs(torch.zeros(batch, seq_len, dtype=torch.int64), None, documents)
    model = build_model(config)
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(inputs, recompute=recompute)
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    angles = (batch, 1, seq_len, config.width_of_head)
    sizes = [t.untyped_storage().nbytes() for t in saved.values() if t.shape != angles]
    # Statistics and indices are narrower than this, all that is counted is wider.
    measured = sum(size for size in sizes if size > num_tokens * 16 * 4)
    expected = activations(
        config,
        num_tokens=num_tokens,
        seq_len=seq_len,
        dtype=torch.float32,
        recompute=recompute,
        masked=masked,
        exchanged=False,
    )
    assert measured == expected.kept


def test_loss_keeps_logits_softmax_and_its_gradient() -> None:
    config = CONFIGS[0]
    logits = torch.zeros(1, 4, config.vocab_size, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        lm_loss(logits, torch.zeros(1, 4, dtype=torch.int64))
    softmax = max(tensor.nbytes for tensor in saved)
    expected = activations(
        config,
        num_tokens=4,
        seq_len=4,
        dtype=torch.bfloat16,
        recompute="none",
        masked=False,
        exchanged=False,
    )
    assert expected.logits == logits.nbytes + 2 * softmax


def test_experts_that_compute_again_hold_one_layer_then() -> None:
    kept = activations(
        KEEPING,
        num_tokens=10,
        seq_len=10,
        dtype=torch.bfloat16,
        recompute="none",
        masked=False,
        exchanged=False,
    )
    assert kept.recomputed == 2 * 10 * 3 * (2 * 48)  # bfloat16, rows, gate and up


def test_recomputation_and_exchange_cost_what_they_hold() -> None:
    config = ModelConfig.model_validate(SIZES | {"num_layers": 2, "moe": MOE})
    plain, exchanged = (
        activations(
            config,
            num_tokens=10,
            seq_len=10,
            dtype=torch.bfloat16,
            recompute="none",
            masked=False,
            exchanged=exchanged,
        )
        for exchanged in (False, True)
    )
    rows = 10 * 3
    assert plain.recomputed == 0
    assert exchanged.kept - plain.kept == 2 * (rows * config.dim * 2)  # layers x bfloat16 rows
