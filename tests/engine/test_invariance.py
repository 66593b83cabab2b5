"""Layout never changes numbers: design section 6, the test that matters most.

Steps in float64 on 1, 2 and 4 gloo ranks, for every (ep, edp, stage, recompute) and
accumulation, against one plain process that computes each expert in a loop and knows nothing of
this code's engine.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.data import MicroBatch
from dmoe.engine import EngineConfig, NativeEngine, StepPosition
from dmoe.engine.sharding import global_view
from dmoe.models import ModelConfig, ModelInputs, build_model
from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.capacity import CapacityConfig
from dmoe.moe.elastic import ElasticK
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, VOCAB = 6, 2, 8, 19
TOLERANCE = 1e-9
OPTIM = OptimConfig(lr=1e-2, max_grad_norm=0.5)

ROUTER = {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01}
MOE = {
    "num_experts": 8,
    "expert_ffn_dim": 16,
    "num_shared_experts": 1,
    "router": ROUTER,
    "losses": {"load_balance_weight": 0.1, "z_loss_weight": 0.01},
}
MODEL = {
    "vocab_size": VOCAB,
    "dim": 16,
    "num_layers": 3,
    "num_heads": 2,
    "ffn_dim": 24,
    "moe": {**MOE, "num_dense_layers": 1},
}


def model_config(**moe: object) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL, "moe": {**MODEL["moe"], **moe}})


FIXED = {
    "global": model_config(),
    "sequence": model_config(losses={"load_balance_weight": 0.1, "load_balance_scope": "sequence"}),
    "micro_batch": model_config(
        losses={"load_balance_weight": 0.1, "load_balance_scope": "micro_batch"},
        capacity={"factor": 0.7, "policy": "score", "minimum": 0},
    ),
    # A capacity of nothing, which no configuration can ask for: every expert drops all its tokens.
    "starved": model_config(
        capacity=CapacityConfig.model_construct(
            factor=0.0, policy="position", minimum=0, group="sequence"
        )
    ),
}
VARYING = {
    "elastic": model_config(
        elastic={"k_max": 4, "budget": 5},
        capacity={"factor": 0.8, "policy": "score", "minimum": 0},
    ),
    "token_elastic": model_config(
        elastic={"k_max": 3, "k_ideal": 5, "granularity": "token", "normalize": False},
        losses={"load_balance_weight": 0.1, "load_balance_scope": "sequence"},
    ),
    "top_p": model_config(
        router={"name": "top_p", "p": 0.5, "controller": {"target_k": 3}},
        capacity={"factor": 1.0, "minimum": 0},
    ),
}


def infinite_config(**infinite: object) -> ModelConfig:
    section = {"ffn_dim": 64, "latent_dim": 4, **infinite}
    return ModelConfig.model_validate(
        {**MODEL, "moe": {"num_dense_layers": 1, "infinite": section}}
    )


INFINITE = {
    "neuron": infinite_config(),
    "block": infinite_config(granularity="block", block_size=8, mask="hard"),
    "deep": infinite_config(
        router={"name": "mixture", "components": 2}, deep={"latent": "hierarchical"}
    ),
}
INFINITE_LAYOUTS = {
    ("neuron", 1): [(1, 0, "full")],
    ("neuron", 2): [(1, 0, "none"), (1, 2, "none"), (1, 3, "full")],
    ("block", 1): [(1, 0, "selective")],
    ("block", 2): [(1, 2, "none"), (2, 3, "full")],
    ("block", 4): [(4, 0, "none"), (2, 3, "none")],
    ("deep", 2): [(1, 3, "none")],
}
MODELS = FIXED | VARYING | INFINITE


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


def train(
    model: ModelConfig, ep: int, stage: int, recompute: str, collapse: bool
) -> dict[str, Tensor]:
    """Train the engine on this layout and return everything that must not depend on it."""
    dims = ParallelDims.create(ep=ep)
    engine = NativeEngine(
        EngineConfig(zero_stage=stage, precision="fp64"),
        model=model,
        optim=OPTIM,
        dims=dims,
        device=torch.device("cpu"),
        seed=5,
        recompute=recompute,
    )
    if collapse:
        send_everything_to_expert_zero(engine.model)
    seen: dict[str, Tensor] = {}
    for step in range(num_steps(collapse)):
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


def num_steps(collapse: bool) -> int:
    """Enough for experts that never see a token to be in step with those that do."""
    return 6 if collapse else 2


def send_everything_to_expert_zero(model: torch.nn.Module) -> None:
    """The bias of expert 0 wins every first choice, that of expert 1 every second one."""
    for layer in model.moe_layers:
        layer.router.expert_bias_E[0] = 10.0
        layer.router.expert_bias_E[1] = 5.0


def plain_training(config: ModelConfig, collapse: bool) -> dict[str, Tensor]:
    """Train as anyone would write it: one process, expert loops, torch's own tools."""
    looped = config.model_copy(update={"moe": config.moe.model_copy(update={"backend": "loop"})})
    model = build_model(looped, compute_dtype=torch.float64, seed=5)
    if collapse:
        send_everything_to_expert_zero(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=OPTIM.betas,
        weight_decay=OPTIM.weight_decay,
    )
    weights = config.moe.losses
    names = {"load_balance": weights.load_balance_weight, "z": weights.z_loss_weight}
    seen: dict[str, Tensor] = {}
    for step in range(num_steps(collapse)):
        batches = micro_batches(step)
        totals = BatchTotals(
            sum(int(b.valid_BS.sum()) for b in batches),
            sum(b.num_targets for b in batches),
            GLOBAL_BATCH,
            len(batches),
        )
        contexts = [plain_context(config, batch, step, totals) for batch in batches]
        first = forward_all(model, batches, contexts, torch.ones(2, 8, dtype=torch.int64))
        counts = sum(torch.stack([m.stats.counts_E for m in output.moe]) for output in first)
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
            for name, weight in names.items()
            if weight
        }
        (loss + sum(names[name] * value for name, value in aux.items())).backward()
        for name, parameter in model.named_parameters():
            seen[f"{step}.grad.{name}"] = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        seen[f"{step}.norm"], seen[f"{step}.loss"] = norm, loss.detach()
        seen |= {f"{step}.{name}": value.detach() / 2 for name, value in aux.items()}
        seen[f"{step}.counts"] = counts
        dropped = sum(torch.stack([m.stats.dropped for m in output.moe]) for output in outputs)
        seen[f"{step}.dropped"] = dropped
        for parameter in model.parameters():
            parameter.grad *= min(1.0, OPTIM.max_grad_norm / norm)
        optimizer.step()
        optimizer.zero_grad()
        for layer, load in zip(model.moe_layers, counts.double(), strict=True):
            if config.moe.infinite:
                continue
            if config.moe.router.name == "top_p":
                layer.end_step(load, totals.num_tokens)
            else:
                layer.router.expert_bias_E += ROUTER["bias_update_rate"] * torch.sign(
                    load.mean() - load
                )
    seen |= {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    seen |= {f"model.{name}": tensor for name, tensor in model.named_buffers()}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            seen[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key]
    return seen


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


def layouts(world_size: int) -> list[tuple[int, int, str]]:
    """Every (ep, stage, recompute) of a world; recompute modes where cheap."""
    stages = [0, 2, 3] if world_size > 1 else [0]
    result = [(ep, stage, "none") for ep in (1, 2, 4) if world_size % ep == 0 for stage in stages]
    last_ep, last_stage, _ = result[-1]
    return [*result, (last_ep, last_stage, "selective"), (last_ep, last_stage, "full")]


def layouts_of(name: str, world_size: int) -> list[tuple[int, int, str]]:
    """Every layout; those that divide the most for what varies in its routing alone."""
    every = layouts(world_size)
    if name in FIXED:
        return every
    if name in INFINITE:
        return INFINITE_LAYOUTS.get((name, world_size), [])
    return [every[-3], every[-1]] if world_size < 4 else []


def all_layouts(world_size: int) -> dict[str, dict[str, Tensor]]:
    """Train every model under every layout of this world."""
    results = {}
    for name, config in MODELS.items():
        for layout in layouts_of(name, world_size):
            results[f"{name} {layout}"] = train(config, *layout, collapse=False)
    results[f"collapsed {layouts(world_size)[-1]}"] = train(
        MODELS["global"], *layouts(world_size)[-1], collapse=True
    )
    return (
        results
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        else {}
    )


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Tensor]]:
    plain = {name: plain_training(config, collapse=False) for name, config in MODELS.items()}
    return plain | {"collapsed": plain_training(MODELS["global"], collapse=True)}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_equals_the_plain_process(world_size, references) -> None:
    if world_size == 1:
        results = all_layouts(1)
    else:
        results = run_distributed(all_layouts, world_size, world_size, timeout=240)[0]
    assert len(results) == sum(len(layouts_of(name, world_size)) for name in MODELS) + 1
    for label, seen in results.items():
        expected = references[label.split()[0]]
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            error = (seen[name].double() - value.double()).abs().max().item()
            assert error <= TOLERANCE, f"world {world_size}, {label}: {name} is off by {error}"


def test_the_collapsed_case_is_what_it_says(references) -> None:
    for step in range(num_steps(collapse=True)):
        counts = references["collapsed"][f"{step}.counts"]
        assert (counts[:, 2:] == 0).all(), "an expert beyond the first two got a token"
    starved = references["starved"]
    assert torch.equal(starved["0.dropped"], starved["0.counts"].sum(1))


def test_the_number_of_experts_does_vary(references) -> None:
    num_tokens = sum(int(batch.valid_BS.sum()) for batch in micro_batches(0))
    elastic, per_token, top_p = (references[name] for name in VARYING)
    for step in range(num_steps(collapse=False)):
        slots = elastic[f"{step}.counts"].sum(1)
        assert slots[0] != slots[1]
        assert slots.sum() == 5 * num_tokens, "the budget"
        assert elastic[f"{step}.dropped"].sum() > 0
        assert (per_token[f"{step}.counts"].sum(1) % num_tokens != 0).all()
    assert top_p["model.layers.1.moe.router.p_shift"] != 0
