"""A small engine and the batches of its steps, for tests of one engine feature each."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.data import MicroBatch
from dmoe.engine import Engine, EngineConfig, StepPosition, StepResult, build_engine
from dmoe.models import ModelConfig
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelDims

SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, VOCAB = 16, 2, 8, 32
LR = 1e-2


def model_config(*, ffn_dim: int = 32, **moe: Any) -> ModelConfig:
    """One dense and one MoE layer."""
    router = {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01}
    experts = {"num_experts": 8, "expert_ffn_dim": 16, "num_dense_layers": 1, "router": router}
    tree = {"dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": SEQ_LEN}
    sizes = {"vocab_size": VOCAB, "ffn_dim": ffn_dim}
    return ModelConfig.model_validate({**tree, **sizes, "moe": {**experts, **moe}})


def small_engine(
    *, ep: int = 1, recompute: str = "none", moe: dict[str, Any] | None = None, **config: Any
) -> Engine:
    """Build an engine over all ranks; `config` is the engine section."""
    return build_engine(
        EngineConfig.model_validate(config),
        model=model_config(**(moe or {})),
        optim=OptimConfig(lr=LR),
        dims=ParallelDims.create(ep=ep),
        device=torch.device("cpu"),
        seed=5,
        recompute=recompute,
    )


def batches(
    step: int, dims: ParallelDims, num_micro_batches: int = GLOBAL_BATCH // MICRO_BATCH
) -> list[MicroBatch]:
    """This rank's micro-batches of a step: a text that can be learnt, with documents."""
    size = num_micro_batches * MICRO_BATCH
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(VOCAB, (size, 1), generator=generator)
    ids = (starts + 3 * torch.arange(SEQ_LEN + 1)) % VOCAB
    documents = torch.zeros(size, SEQ_LEN, dtype=torch.int64)
    documents[1, 5:] = 1
    positions = torch.arange(SEQ_LEN).repeat(size, 1)
    positions[1, 5:] -= 5
    result = []
    for index in range(dims.rank, num_micro_batches, dims.world_size):
        rows = slice(index * MICRO_BATCH, (index + 1) * MICRO_BATCH)
        sample_ids = torch.arange(size)[rows] + step * size
        columns = (ids[rows, :-1], ids[rows, 1:], positions[rows], documents[rows])
        result.append(MicroBatch(index, sample_ids, *columns))
    return result


def gradients(engine: Engine, step: int = 0) -> StepResult:
    """Compute the gradients of a step."""
    position = StepPosition(3, step, GLOBAL_BATCH, GLOBAL_BATCH // MICRO_BATCH)
    return engine.forward_backward(batches(step, engine.dims), position)


def train(engine: Engine, steps: int, first: int = 0) -> list[float]:
    """Take steps, clipped to a norm of 1, and return their losses."""
    losses = []
    for step in range(first, first + steps):
        result = gradients(engine, step)
        engine.clip(1.0)
        engine.step(LR, result)
        losses.append(result.loss)
    return losses


def full(tensor: Tensor) -> Tensor:
    """Return a copy of the whole tensor, wherever its parts are."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_state(engine: Engine) -> dict[str, Tensor]:
    """Return a copy of everything that a checkpoint would hold."""
    return {name: full(tensor) for name, tensor in engine.state().items()}
