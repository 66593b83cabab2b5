"""Chooses the next token from logits: greedy, temperature, top-k, top-p. Called by `decoding`.

Pure functions: randomness comes in as uniform numbers. Shapes: B sequences, V vocabulary, N tokens.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator
from torch import Tensor

from dmoe.config.base import ConfigModel
from dmoe.rng import numpy_generator


class SamplingConfig(ConfigModel):
    """How a text is continued, and when it ends."""

    max_new_tokens: PositiveInt = 200
    """Tokens to add at most."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 always takes the most probable token."""
    top_k: PositiveInt | None = None
    """Draw from so many of the most probable tokens; null for all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the fewest most probable tokens that together have at least this probability, after
    `top_k`; 1 for all."""
    seed: NonNegativeInt = 0
    """Of the draws."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError(
                f"stop = {list(stop)} holds an empty string, which would end every text before "
                f"its first token: remove it"
            )
        return stop


def sample_next(logits_BV: Tensor, uniform_B: Tensor, config: SamplingConfig) -> Tensor:
    """Return the (B,) int64 next token of each sequence.

    Args:
        logits_BV: scores of the next token.
        uniform_B: float64 numbers in [0, 1), one for each draw.
        config: which tokens are drawn from, and with what probabilities.
    """
    # Summed in float64: in float32 the tail of a large vocabulary would never be drawn.
    cumulative_BV = next_probs(logits_BV, config).double().cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return (cumulative_BV <= target_B1).sum(-1)


def next_probs(logits_BV: Tensor, config: SamplingConfig) -> Tensor:
    """Return the (B, V) probabilities to draw with, in float32 at least.

    Where equal logits meet the limit of `top_k` or `top_p`, the lowest ids are kept; so with
    temperature 0.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if config.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BV).scatter(1, best_B1, 1.0)
    # Below the largest logit, no temperature is so low that the quotient overflows.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / config.temperature
    probs_BV, ids_BV = scaled_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if config.top_k is not None:
        probs_BV[:, config.top_k :] = 0
        probs_BV = probs_BV / probs_BV.sum(-1, keepdim=True)
    if config.top_p < 1:
        more_probable_BV = probs_BV.double().cumsum(-1) - probs_BV
        probs_BV = probs_BV.masked_fill(more_probable_BV >= config.top_p, 0)
        probs_BV = probs_BV / probs_BV.sum(-1, keepdim=True)
    return torch.zeros_like(probs_BV).scatter(1, ids_BV, probs_BV)


def draws(prompts: Sequence[str], config: SamplingConfig) -> Tensor:
    """Return (B, N) float64 uniform numbers for the N = `max_new_tokens` draws of each prompt.

    They depend on the seed, the prompt and how often the prompt came before it in the list, so that
    a continuation is the same in every batch, and copies of a prompt are continued differently.
    """
    seen: Counter[str] = Counter()
    rows = []
    for prompt in prompts:
        generator = numpy_generator(config.seed, "sample", seen[prompt], prompt)
        rows.append(generator.random(config.max_new_tokens))
        seen[prompt] += 1
    return torch.from_numpy(np.stack(rows))
