"""Time a step of both engines, and compare the memory that they hold with what is estimated.

    python tools/benchmarks/engines.py [--rounds N] [--clock cpu]

Two gloo processes with one thread each, ep 2, the model of configs/quickstart.yaml. The engines
take their steps in turn.
"""

import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import Settings, measure, parse_settings, peer_version, ratio, report
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dmoe.config import load_config
from dmoe.data import MicroBatch
from dmoe.engine import Engine, StepPosition, build_engine
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed
from dmoe.testing.memory import live_bytes, storage_bytes
from dmoe.trainer.config import Config
from dmoe.trainer.estimate import estimate

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NUM_RANKS, EP = 2, 2
ENGINES = [("native", 2), ("deepspeed", 1), ("deepspeed", 2), ("native", 3), ("deepspeed", 3)]
REFERENCE = {1: "native 2", 2: "native 2", 3: "native 3"}
KINDS = ("parameters", "compute_weights", "gradients", "optimizer", "activations")
Memory = dict[str, int]


def configure(name: str, stage: int, precision: str) -> Config:
    """Return the configuration of a run with an engine."""
    choices = {"name": name, "zero_stage": stage, "precision": precision}
    overrides = [f"parallel.ep={EP}", *(f"engine.{key}={value}" for key, value in choices.items())]
    return load_config(CONFIG, overrides, Config)


def build(config: Config) -> Engine:
    """Build the engine on this rank."""
    return build_engine(
        config.engine,
        model=config.model,
        optim=config.optim,
        dims=ParallelDims.create(ep=config.parallel.ep),
        device=torch.device("cpu"),
        seed=0,
    )


def random_batch(config: Config, index: int) -> MicroBatch:
    """Return a micro-batch without padding or document boundaries."""
    shape = (config.train.micro_batch_size, config.train.seq_len)
    tokens_BS = torch.randint(config.model.vocab_size, shape)
    return MicroBatch(
        index=index,
        sample_ids_B=torch.arange(shape[0]) + index * shape[0],
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        positions_BS=torch.arange(shape[1]).expand(shape).contiguous(),
        document_ids_BS=torch.zeros(shape, dtype=torch.int64),
    )


def step_of(engine: Engine, config: Config, batch: MicroBatch) -> Callable[[], None]:
    """Return a step on one micro-batch a rank."""
    position = StepPosition(0, 0, NUM_RANKS * config.train.micro_batch_size, NUM_RANKS)

    def step() -> None:
        result = engine.forward_backward([batch], position)
        engine.clip(config.optim.max_grad_norm)
        engine.step(config.optim.lr, result)

    return step


def times(precision: str, settings: Settings) -> dict[str, list[float]]:
    """Return the milliseconds of each engine's steps on this rank."""
    rank = torch.distributed.get_rank()
    steps = {}
    for name, stage in ENGINES:
        config = configure(name, stage, precision)
        steps[f"{name} {stage}"] = step_of(build(config), config, random_batch(config, rank))
    return measure(steps, settings)


class Kept:
    """The storages that autograd keeps for the backward pass, without weights and logits."""

    def __init__(self, engine: Any, config: Config):
        self.model = engine.model
        train = config.train
        self.num_logits = train.micro_batch_size * train.seq_len * config.model.vocab_size
        self.sizes: dict[int, int] = {}

    def save(self, tensor: Tensor) -> Tensor:
        """Count a tensor, once for each storage. Gathered weights are parameters by now."""
        local = getattr(tensor, "_local_tensor", tensor)
        storage = local.untyped_storage()
        weights = {
            getattr(p, "_local_tensor", p).untyped_storage().data_ptr()
            for p in self.model.parameters()
        }
        if storage.data_ptr() not in weights and local.numel() != self.num_logits:
            self.sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    @property
    def bytes(self) -> int:
        """Sum of all."""
        return sum(self.sizes.values())


def held(config: Config) -> Memory:
    """Return the bytes by kind that this rank holds between the backward pass and the update.

    Of activations, those that are kept between the forward and the backward pass.
    """
    rank = torch.distributed.get_rank()
    batch = random_batch(config, rank)
    before = live_bytes()
    engine: Any = build(config)
    own = list(getattr(engine, "own", dict(engine.model.named_parameters())).values())
    masters, states, computing = list(own), [engine.optimizer.state], []
    if config.engine.name == "deepspeed":
        inner = engine.zero.optimizer.optimizer
        masters += list(inner.state)
        states.append(inner.state)
        hidden = {id(parameter) for parameter in own}
        given = [p for p in engine.model.parameters() if id(p) not in hidden]
        computing = [getattr(parameter, "ds_tensor", parameter) for parameter in given]
    moments = [m[key] for s in states for m in s.values() for key in ("exp_avg", "exp_avg_sq")]
    position = StepPosition(0, 0, NUM_RANKS * config.train.micro_batch_size, NUM_RANKS)
    kept = Kept(engine, config)
    with saved_tensors_hooks(kept.save, lambda tensor: tensor):
        engine.forward_backward([batch], position)
    memory = {
        "parameters": storage_bytes(masters),
        "compute_weights": storage_bytes(computing),
        "optimizer": storage_bytes(moments),
    }
    # Nothing else lives on at this moment.
    memory["gradients"] = live_bytes() - before - sum(memory.values())
    return memory | {"activations": kept.bytes}


def compare(name: str, stage: int, precision: str) -> tuple[Memory, Memory]:
    """Return what rank 0 holds under an engine, in processes of its own, and the estimate."""
    config = configure(name, stage, precision)
    measured = run_distributed(held, NUM_RANKS, config, timeout=280)[0]
    return measured, estimate(config, NUM_RANKS).to_json()["memory"]


def report_times(settings: Settings) -> None:
    """Measure and write the table of step times."""
    rows = []
    for precision in ("fp32", "bf16"):
        by_engine = run_distributed(times, NUM_RANKS, precision, settings, timeout=1200)[0]
        for name, stage in ENGINES:
            own = by_engine[f"{name} {stage}"]
            share = ratio(own, by_engine[REFERENCE[stage]])
            rows.append(
                [precision, name, str(stage), f"{statistics.median(own):.1f}", f"{share:.2f}"]
            )
    report(
        "Engines: step time",
        f"A step of configs/quickstart.yaml on {NUM_RANKS} gloo ranks with ep {EP}, one "
        "micro-batch of 2048 tokens a rank: forward, backward, clip and AdamW. Stages 1 and 2 are "
        "compared with native's stage 2, stage 3 with its stage 3.",
        ["precision", "engine", "stage", "ms", "/ native"],
        rows,
        settings=settings.describe(),
        peers=peer_version("deepspeed"),
    )


def report_memory() -> None:
    """Measure and write the table of memory."""
    rows = []
    for precision, (name, stage) in product(("fp32", "bf16"), ENGINES):
        measured, expected = compare(name, stage, precision)
        cells = [f"{measured[kind] / 2**20:.2f} / {expected[kind] / 2**20:.2f}" for kind in KINDS]
        rows.append([precision, name, str(stage), *cells])
    report(
        "Engines: memory of a rank",
        f"MiB measured / estimated by `dmoe estimate`, of rank 0 of {NUM_RANKS} with ep {EP}, "
        "configs/quickstart.yaml, between the backward pass and the update; activations are what "
        "autograd keeps between the forward and the backward pass, estimated for balanced experts. "
        "What is gathered or cast while layers compute, and gradients on their way, is gone by "
        "then; of compute weights only what DeepSpeed holds for good is measured.",
        ["precision", "engine", "stage", *(kind.replace("_", " ") for kind in KINDS)],
        rows,
        peers=peer_version("deepspeed"),
    )


def main() -> None:
    """Measure and write both tables."""
    settings = parse_settings(__doc__)._replace(threads=1)
    report_memory()
    report_times(settings)


if __name__ == "__main__":
    main()
