"""Decoder language models: configuration, building, loss."""

import torch

from dmoe.models.config import ModelConfig
from dmoe.models.decoder import DecoderLM, ModelInputs, ModelOutput, Recompute, lm_loss
from dmoe.models.init import init_weights
from dmoe.parallel import ParallelDims


def build_model(
    config: ModelConfig,
    *,
    dims: ParallelDims | None = None,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DecoderLM:
    """Build a model with initial weights, of which this rank holds its share of the experts.

    Args:
        config: the `model` section.
        dims: the layout; None for one process.
        device: where the weights are; "meta" builds shapes alone.
        compute_dtype: of activations and matrix products. Weights are float32, or float64 with it.
        seed: of the initial weights.
    """
    dims = dims or ParallelDims()
    with torch.device("meta"):
        model = DecoderLM(config, dims=dims, compute_dtype=compute_dtype)
    if compute_dtype == torch.float64:
        model = model.double()
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        init_weights(model, seed=seed, dims=dims)
    return model


__all__ = [
    "DecoderLM",
    "ModelConfig",
    "ModelInputs",
    "ModelOutput",
    "Recompute",
    "build_model",
    "init_weights",
    "lm_loss",
]
