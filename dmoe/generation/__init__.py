"""Text from a model: sampling with a KV cache, for batches of prompts of any lengths."""

from dmoe.generation.decoding import Generation, generate
from dmoe.generation.sampling import SamplingConfig, next_probs, sample_next

__all__ = ["Generation", "SamplingConfig", "generate", "next_probs", "sample_next"]
