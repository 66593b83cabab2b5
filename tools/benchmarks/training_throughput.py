"""Time training steps of the quickstart model against the same shape built with transformers.

    pip install -e .[bench] && python tools/benchmarks/training_throughput.py [--rounds N]

One process, float32, the same batch, fused AdamW, one global clip and the balance loss on both
sides: the native engine's step here, a plain loop over `Qwen3MoeForCausalLM` there.
"""

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from harness import measure, parse_settings, peer_version, ratio, report

from dmoe.config import load_config
from dmoe.data import MicroBatch
from dmoe.engine import NativeEngine, StepPosition
from dmoe.models import ModelConfig
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelDims
from dmoe.trainer.config import Config

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


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


def main() -> None:
    """Measure and write the table."""
    settings = parse_settings(__doc__)
    config = load_config(CONFIG, ["parallel.ep=1"], Config)
    batch = random_batch(config)
    steps = {"dmoe": our_step(config, batch)} | {
        f"transformers, {name}": hugging_face_step(config.model, config.optim, batch, name)
        for name in ("eager", "grouped_mm")
    }
    times = measure({name: step for name, step in steps.items() if step}, settings)
    rows = []
    for name in steps:
        if name not in times:
            rows.append([name, "not installed", "", ""])
            continue
        speed = batch.tokens_BS.numel() / statistics.median(times[name]) * 1e3
        rows.append(
            [
                name,
                f"{statistics.median(times[name]):.1f}",
                f"{speed:.0f}",
                f"{ratio(times[name], times['dmoe']):.2f}",
            ]
        )
    report(
        "Training throughput",
        f"A step of {batch.tokens_BS.numel()} tokens of configs/quickstart.yaml, float32: forward, "
        "backward, clip and AdamW.",
        ["training step", "ms", "tokens/s", "dmoe is faster by"],
        rows,
        settings=settings.describe(),
        peers=peer_version("transformers"),
    )


if __name__ == "__main__":
    main()
