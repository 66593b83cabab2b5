"""A small model with three MoE layers and a text, for the tests of what is measured on them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoe.data import MicroBatch, PackedDataset, TokenSplit, eval_batches
from dmoe.models import DecoderLM, ModelConfig, build_model

SEQ_LEN, EXPERTS, LAYERS = 8, 4, 3


def model_of(**moe: Any) -> DecoderLM:
    """Return the model in float64, with weights large enough that experts and k matter."""
    config = ModelConfig.model_validate(
        {
            "vocab_size": 19,
            "dim": 16,
            "num_layers": LAYERS + 1,
            "num_heads": 2,
            "ffn_dim": 16,
            "init_std": 0.3,
            "moe": {"num_experts": EXPERTS, "expert_ffn_dim": 8, "num_dense_layers": 1, **moe},
        }
    )
    return build_model(config, compute_dtype=torch.float64, seed=2)


def text() -> TokenSplit:
    """Documents of 0 to 16 tokens, 101 in all, so that the last window is padded."""
    lengths = [*np.random.default_rng(0).integers(0, 17, size=11).tolist()]
    lengths.append(101 - sum(lengths))
    return TokenSplit(
        source="memory",
        fingerprint="",
        path=Path("memory.bin"),
        ids=np.random.default_rng(1).integers(0, 19, size=101).astype(np.uint16),
        document_starts=np.cumsum([0, *lengths]),
        text_bytes=90,
    )


def batches(micro_batch_size: int = 2) -> list[MicroBatch]:
    """Return the whole text."""
    sizes = {"seq_len": SEQ_LEN, "micro_batch_size": micro_batch_size, "vocab_size": 19}
    return list(eval_batches(text(), **sizes))


def dataset(seed: int = 0) -> PackedDataset:
    """Return the text as training data."""
    return PackedDataset(text(), seq_len=SEQ_LEN, seed=seed, vocab_size=19)
