"""The plain twin of the engine: one process, torch's own tools, experts in a loop.

What tests of invariance share: the global batch of a step, with documents and padding, a training
on any layout, and the same training as anyone would write it.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.data import MicroBatch
from dmoe.engine import EngineConfig, NativeEngine, StepPosition
from dmoe.engine.sharding import global_view
from dmoe.models import DecoderLM, ModelConfig, ModelInputs, ModelOutput, build_model
from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.elastic import ElasticK
from dmoe.moe.stats import all_counts
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelDims

SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, VOCAB = 6, 2, 8, 19
OPTIM = OptimConfig(lr=1e-2, max_grad_norm=0.5)
SIZES = {"vocab_size": VOCAB, "dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24}
"""Of every model; the first layer is to be dense."""

Change = Callable[[DecoderLM], None]
"""What a test does to a model before it trains."""


def micro_batches(step: int) -> list[MicroBatch]:
    """The global batch of a step: packed documents, padding, a micro-batch of it only."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    documents = torch.zeros(GLOBAL_BATCH, SEQ_LEN, dtype=torch.int64)
    documents[1, 3:] = 1
    documents[2, 4:] = -1
    documents[4:6] = -1
    labels = tokens[:, 1:].masked_fill(documents < 0, -100)
    positions = torch.arange(SEQ_LEN).repeat(GLOBAL_BATCH, 1)
    positions[1, 3:] -= 3
    batches = []
    for index in range(GLOBAL_BATCH // MICRO_BATCH):
        rows = slice(index * MICRO_BATCH, (index + 1) * MICRO_BATCH)
        sample_ids = torch.arange(GLOBAL_BATCH)[rows] + step * GLOBAL_BATCH
        batches.append(
            MicroBatch(
                index, sample_ids, tokens[rows, :-1], labels[rows], positions[rows], documents[rows]
            )
        )
    return batches


def position(step: int) -> StepPosition:
    return StepPosition(3, step, GLOBAL_BATCH, GLOBAL_BATCH // MICRO_BATCH)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def engine_training(
    config: ModelConfig,
    ep: int,
    stage: int,
    recompute: str,
    *,
    num_steps: int = 2,
    change: Change | None = None,
) -> dict[str, Tensor]:
    """Train the engine on this layout and return everything that must not depend on it."""
    dims = ParallelDims.create(ep=ep)
    engine = NativeEngine(
        EngineConfig(zero_stage=stage, precision="fp64"),
        model=config,
        optim=OPTIM,
        dims=dims,
        device=torch.device("cpu"),
        seed=5,
        recompute=recompute,
    )
    if change is not None:
        change(engine.model)
    seen: dict[str, Tensor] = {}
    for step in range(num_steps):
        batches = micro_batches(step)[dims.rank :: dims.world_size]
        result = engine.forward_backward(batches, position(step))
        for name, parameter in engine.model.named_parameters():
            seen[f"{step}.grad.{name}"] = full(global_view(name, parameter.grad, dims))
        seen[f"{step}.norm"] = torch.tensor(engine.clip(OPTIM.max_grad_norm), dtype=torch.float64)
        seen[f"{step}.loss"] = torch.tensor(result.loss, dtype=torch.float64)
        for name, value in result.aux_losses.items():
            seen[f"{step}.{name}"] = torch.tensor(value, dtype=torch.float64)
        seen[f"{step}.counts"], seen[f"{step}.dropped"] = result.counts_LE, result.dropped_L
        engine.step(OPTIM.lr, result)
    return seen | {name: full(tensor) for name, tensor in engine.state().items()}


def plain_training(
    config: ModelConfig, *, num_steps: int = 2, change: Change | None = None
) -> dict[str, Tensor]:
    """Train as anyone would write it: one process, expert loops, torch's own tools."""
    looped = config.model_copy(update={"moe": config.moe.model_copy(update={"backend": "loop"})})
    model = build_model(looped, compute_dtype=torch.float64, seed=5)
    if change is not None:
        change(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=OPTIM.lr,
        betas=OPTIM.betas,
        weight_decay=OPTIM.weight_decay,
    )
    weights, num_layers = config.moe.loss_weights(), len(config.moe_layers)
    seen: dict[str, Tensor] = {}
    for step in range(num_steps):
        batches = micro_batches(step)
        totals = BatchTotals(
            sum(int(b.valid_BS.sum()) for b in batches),
            sum(b.num_targets for b in batches),
            GLOBAL_BATCH,
            len(batches),
        )
        contexts = [plain_context(config, batch, step, totals) for batch in batches]
        none = torch.ones(num_layers, config.moe.num_slots_counted, dtype=torch.int64)
        first = forward_all(model, batches, contexts, none)
        counts = sum(torch.stack([all_counts(m.stats) for m in output.moe]) for output in first)
        contexts = [plain_context(config, batch, step, totals) for batch in batches]
        outputs = forward_all(model, batches, contexts, counts)
        loss = (
            sum(
                torch.nn.functional.cross_entropy(
                    o.logits.flatten(0, 1), b.labels_BS.flatten(), reduction="sum"
                )
                for o, b in zip(outputs, batches, strict=True)
            )
            / totals.num_targets
        )
        aux = {
            name: sum(layer.losses[name] for output in outputs for layer in output.moe)
            for name in outputs[0].moe[0].losses
        }
        (loss + sum(weight * aux[name] for name, weight in weights.items())).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            seen[f"{step}.grad.{name}"] = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        seen[f"{step}.norm"], seen[f"{step}.loss"] = norm, loss.detach()
        seen |= {f"{step}.{name}": value.detach() / num_layers for name, value in aux.items()}
        seen[f"{step}.counts"] = counts[:, : config.moe.num_counted]
        dropped = sum(torch.stack([m.stats.dropped for m in output.moe]) for output in outputs)
        seen[f"{step}.dropped"] = dropped
        for parameter in model.parameters():
            parameter.grad *= min(1.0, OPTIM.max_grad_norm / norm)
        optimizer.step()
        optimizer.zero_grad()
        adapt(model, config, outputs, totals.num_tokens)
    seen |= {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    seen |= {f"model.{name}": tensor for name, tensor in model.named_buffers()}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            seen[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key]
    return seen


def adapt(
    model: DecoderLM, config: ModelConfig, outputs: list[ModelOutput], num_tokens: int
) -> None:
    """Let the routers adapt to a step; the selection bias by its formula."""
    moe = config.moe
    for index, layer in enumerate(model.moe_layers):
        stats = [output.moe[index].stats for output in outputs]
        counts_E = sum(s.counts_E for s in stats)
        plain = moe.infinite is None and moe.zero_computation is None and moe.expert_layer is None
        if plain and moe.router.name == "top_k":
            load_E = counts_E.double()
            sign_E = torch.sign(load_E.mean() - load_E)
            layer.router.expert_bias_E += moe.router.bias_update_rate * sign_E
            continue
        vectors = [name for name, value in stats[0].sums.items() if value.ndim]
        means = {name: sum(s.sums[name] for s in stats) / num_tokens for name in vectors}
        layer.end_step(counts_E, num_tokens, means)


def plain_context(
    config: ModelConfig, batch: MicroBatch, step: int, totals: BatchTotals
) -> MoEContext:
    token_ids = batch.sample_ids_B[:, None] * SEQ_LEN + torch.arange(SEQ_LEN)
    elastic, k_L = config.moe.elastic, None
    if elastic is not None:
        draw = ElasticK(elastic, num_layers=len(config.moe_layers), seed=3)
        k_L = draw.k_L(step, batch.index, token_ids.flatten())
    return MoEContext(
        seq_len=SEQ_LEN,
        valid_T=batch.valid_BS.flatten(),
        token_ids_T=token_ids.flatten(),
        totals=totals,
        k_L=k_L,
        k_ideal=elastic.k_ideal if elastic else None,
        seed=3,
        step=step,
        micro_batch=batch.index,
    )


def forward_all(model, batches, contexts, counts):
    return [
        model(
            ModelInputs(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS),
            dataclasses.replace(context, counts_LE=counts),
        )
        for batch, context in zip(batches, contexts, strict=True)
    ]
