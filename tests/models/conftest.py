from collections.abc import Callable

import pytest
import torch

from dmoe.models import DecoderLM, ModelConfig, build_model

MOE = {"num_experts": 4, "expert_ffn_dim": 8, "num_shared_experts": 1, "num_dense_layers": 1}


@pytest.fixture
def small_model() -> Callable[..., DecoderLM]:
    """Builds a model of one dense and two MoE layers, with weights large enough to matter."""

    def build(compute_dtype: torch.dtype = torch.float64, **options) -> DecoderLM:
        sizes = {
            "vocab_size": 19,
            "dim": 16,
            "num_layers": 3,
            "num_heads": 4,
            "ffn_dim": 24,
            "max_seq_len": 32,
            "init_std": 0.3,
            "moe": MOE,
        }
        return build_model(ModelConfig(**{**sizes, **options}), compute_dtype=compute_dtype)

    return build
