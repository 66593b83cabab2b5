"""In bfloat16 a frequent token's embedding gradient is a sum of thousands: every stage adds it up.

Gathered in bfloat16, as FSDP does with what it mixes, the sum would stop growing long before.
"""

import torch
from torch import Tensor

from dmoe.data import MicroBatch
from dmoe.engine import EngineConfig, NativeEngine, StepPosition
from dmoe.models import ModelConfig
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

BATCH, SEQ_LEN, VOCAB = 16, 256, 8
MODEL = {"vocab_size": VOCAB, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
FAMILIES = [{}, {"family": "gpt2", "tie_embeddings": True}]


def embedding_gradient(family: dict[str, object], precision: str, stage: int) -> Tensor:
    dims = ParallelDims.create()
    engine = NativeEngine(
        EngineConfig(precision=precision, zero_stage=stage),
        model=ModelConfig.model_validate(MODEL | family),
        optim=OptimConfig(),
        dims=dims,
        device=torch.device("cpu"),
        seed=0,
    )
    # Four of five tokens are the same one.
    generator = torch.Generator().manual_seed(dims.rank)
    drawn = torch.randint(VOCAB, (BATCH, SEQ_LEN), generator=generator)
    tokens = drawn.where(torch.rand(BATCH, SEQ_LEN, generator=generator) < 0.2, 0)
    positions = torch.arange(SEQ_LEN).expand(BATCH, -1)
    ids = torch.arange(BATCH) + dims.rank * BATCH
    batch = MicroBatch(dims.rank, ids, tokens, tokens, positions, torch.zeros_like(tokens))
    engine.forward_backward([batch], StepPosition(0, 0, 2 * BATCH, 2))
    gradient = engine.model.embed.weight.grad
    assert gradient is not None
    return (gradient.full_tensor() if stage else gradient).clone()


def gradients() -> list[list[Tensor]]:
    """For each family the gradient in float32, and in bfloat16 at every stage."""
    return [
        [embedding_gradient(family, "fp32", 0)]
        + [embedding_gradient(family, "bf16", stage) for stage in (0, 2, 3)]
        for family in FAMILIES
    ]


def test_every_stage_adds_up_the_gradient_of_a_frequent_token() -> None:
    for exact, *stages in run_distributed(gradients, 2)[0]:
        for gradient in stages:
            assert (gradient - exact).norm() < 0.02 * exact.norm()
