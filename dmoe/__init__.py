"""dmoe: distributed training of Mixture-of-Experts language models."""
