"""Time training steps of the quickstart model against the same shape built with transformers.

    pip install -e .[bench] && python tools/benchmarks/training_throughput.py [--rounds N]

Float32, fused AdamW, one global clip and the balance loss on both sides: the native engine's step
here, a plain loop over `Qwen3MoeForCausalLM` there. They take their steps in turn, each in a
process of its own: ours takes memory as a training run does, theirs as torch does, and once more as
ours.
"""

import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from harness import Settings, measure, parse_settings, peer_version, prepare, ratio, report

from dmoe.config import load_config
from dmoe.data import MicroBatch
from dmoe.engine import NativeEngine, StepPosition
from dmoe.models import ModelConfig
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelDims
from dmoe.trainer.config import Config

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
OURS = "dmoe"
TUNED = ", memory as in dmoe"
PEERS = ("transformers, eager", "transformers, grouped_mm", f"transformers, grouped_mm{TUNED}")


def our_step(config: Config, batch: MicroBatch) -> Callable[[], None]:
    """Return a step of the native engine."""
    engine = NativeEngine(
        config.engine,
        model=config.model,
        optim=config.optim,
        dims=ParallelDims(),
        device=torch.device("cpu"),
        seed=0,
    )
    position = StepPosition(
        seed=0, step=0, num_sequences=batch.tokens_BS.shape[0], num_micro_batches=1
    )

    def step() -> None:
        result = engine.forward_backward([batch], position)
        engine.clip(config.optim.max_grad_norm)
        engine.step(config.optim.lr, result)

    return step


def hugging_face_step(
    model: ModelConfig, optim: OptimConfig, batch: MicroBatch, implementation: str
) -> Callable[[], None] | None:
    """Return a step of the plain loop, or None where transformers is not installed."""
    if find_spec("transformers") is None:
        return None
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

    assert model.moe is not None
    config = Qwen3MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.width_of_head,
        max_position_embeddings=model.max_seq_len,
        intermediate_size=model.ffn_dim,
        moe_intermediate_size=model.moe.expert_ffn_dim,
        num_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.router.top_k,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=model.moe.losses.load_balance_weight,
        tie_word_embeddings=model.tie_embeddings,
        experts_implementation=implementation,
        use_cache=False,
    )
    network = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )

    def step() -> None:
        loss = network(input_ids=batch.tokens_BS, labels=batch.tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def random_batch(config: Config) -> MicroBatch:
    """Return a micro-batch without padding or document boundaries."""
    shape = (config.train.micro_batch_size, config.train.seq_len)
    tokens_BS = torch.randint(config.model.vocab_size, shape)
    return MicroBatch(
        index=0,
        sample_ids_B=torch.arange(shape[0]),
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        positions_BS=torch.arange(shape[1]).expand(shape).contiguous(),
        document_ids_BS=torch.zeros(shape, dtype=torch.int64),
    )


class Process:
    """A process that takes a training step when it is called, and returns when it is done."""

    def __init__(self, name: str, settings: Settings):
        context = torch.multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        context.Process(target=_serve, args=(name, settings, theirs), daemon=True).start()
        theirs.close()
        self.is_installed: bool = self._connection.recv()

    def __call__(self) -> None:
        """Take a step."""
        self._connection.send(None)
        self._connection.recv()


def _serve(name: str, settings: Settings, connection: Connection) -> None:
    """Take steps as they are asked for."""
    if name == OURS or name.endswith(TUNED):
        prepare(settings)
    else:
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # of the process that has started this one
        torch.set_num_threads(settings.threads)
    config = load_config(CONFIG, ["parallel.ep=1"], Config)
    batch = random_batch(config)
    step = (
        our_step(config, batch)
        if name == OURS
        else hugging_face_step(config.model, config.optim, batch, name.split(", ")[1])
    )
    connection.send(step is not None)
    with suppress(EOFError):  # no more is asked for
        while step is not None:
            connection.recv()
            step()
            connection.send(None)


def main() -> None:
    """Measure and write the table."""
    settings = parse_settings(__doc__)
    if settings.clock != "wall":
        raise SystemExit("--clock cpu: the steps are other processes', take --clock wall")
    names = (OURS, *PEERS)
    processes = {name: Process(name, settings) for name in names}
    times = measure({name: p for name, p in processes.items() if p.is_installed}, settings)
    train = load_config(CONFIG, [], Config).train
    num_tokens = train.micro_batch_size * train.seq_len
    rows = []
    for name in names:
        if name not in times:
            rows.append([name, "not installed", "", ""])
            continue
        median = statistics.median(times[name])
        faster = ratio(times[name], times[OURS])
        rows.append([name, f"{median:.1f}", f"{1e3 * num_tokens / median:.0f}", f"{faster:.2f}"])
    report(
        "Training throughput",
        f"A step of {num_tokens} tokens of configs/quickstart.yaml, float32: forward, backward, "
        "clip and AdamW; each contender in a process of its own.",
        ["training step", "ms", "tokens/s", "dmoe is faster by"],
        rows,
        settings=settings.describe(),
        peers=peer_version("transformers"),
    )


if __name__ == "__main__":
    main()
