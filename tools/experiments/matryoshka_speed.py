"""How time follows k: reading and writing text at each k, and a training step with elastic k.

All contenders are timed in turn in one process, by the harness of tools/benchmarks. Called by
`matryoshka.py`. Shapes: B sequences, S columns of the forward pass.
"""

import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from experiment_step import training_step
from matryoshka_arms import SWEEP, arm_config

from dmoe.models import DecoderLM, ModelConfig, ModelInputs, build_model
from dmoe.models.attention import KVCache
from dmoe.models.counts import flops_per_token

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from harness import Settings, machine, measure, prepare

MODEL = ModelConfig.model_validate(
    {
        "dim": 256,
        "num_layers": 4,
        "num_heads": 4,
        "max_seq_len": 1024,
        "moe": {"num_experts": 16, "expert_ffn_dim": 512},
    }
)
"""Experts dominate: at k = 8 they take most of the FLOPs."""
PREFILL_TOKENS = 1024
DECODE_SEQUENCES = (1, 8)
DECODE_PROMPT, DECODE_STEPS = 32, 16
STEP_K = (2, 4)
"""Mean k of the training steps that are compared."""


def measure_speed(path: Path, settings: Settings) -> None:
    """Time everything and write it to `path`, milliseconds of each round."""
    prepare(settings)
    model = build_model(MODEL).eval()
    passes = {"prefill": {k: _prefill(model, k) for k in SWEEP}}
    sizes = {"prefill": (PREFILL_TOKENS, PREFILL_TOKENS)}
    for num in DECODE_SEQUENCES:
        passes[f"decode {num}"] = {k: _decode(model, k, num) for k in SWEEP}
        sizes[f"decode {num}"] = (num * DECODE_STEPS, DECODE_PROMPT)
    numbers = {
        "model": MODEL.model_dump(mode="json"),
        "passes": [
            {
                "name": name,
                "tokens": sizes[name][0],
                "flops": {
                    k: flops_per_token(MODEL, sizes[name][1], training=False, k=k) for k in SWEEP
                },
                "ms": measure(contenders, settings),
            }
            for name, contenders in passes.items()
        ],
        "step_ms": {
            k: measure({"fixed": _fixed_step(k), "elastic": _elastic_step(k)}, settings)
            for k in STEP_K
        },
        "settings": settings.describe(),
        "machine": machine(),
        "date": str(date.today()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1) + "\n")


def _prefill(model: DecoderLM, k: int) -> Callable[[], object]:
    """Return a pass over a prompt, of which the last logits are wanted."""
    tokens_BS = torch.randint(MODEL.vocab_size, (1, PREFILL_TOKENS))

    @torch.no_grad()
    def run() -> object:
        with model.at_k(k):
            return model(ModelInputs(tokens_BS), last_only=True)

    return run


def _decode(model: DecoderLM, k: int, num_sequences: int) -> Callable[[], object]:
    """Return some steps of one token a sequence, after a prompt that is in the cache."""
    caches = [
        KVCache.allocate(
            MODEL,
            batch_size=num_sequences,
            max_len=DECODE_PROMPT + DECODE_STEPS,
            dtype=model.compute_dtype,
            device=torch.device("cpu"),
        )
        for _ in model.blocks
    ]
    length = DECODE_PROMPT + DECODE_STEPS
    tokens_BS = torch.randint(MODEL.vocab_size, (num_sequences, length))
    with torch.no_grad(), model.at_k(k):
        model(ModelInputs(tokens_BS[:, :DECODE_PROMPT]), caches=caches)

    @torch.no_grad()
    def run() -> None:
        for cache in caches:
            cache.length = DECODE_PROMPT
        with model.at_k(k):
            for at in range(DECODE_PROMPT, length):
                model(ModelInputs(tokens_BS[:, at : at + 1]), caches=caches, last_only=True)

    return run


def _fixed_step(k: int) -> Callable[[], object]:
    return _step("k1", f"model.moe.router.top_k={k}")


def _elastic_step(k: int) -> Callable[[], object]:
    """Return a step that draws k for each layer, with the same sum in every micro-batch."""
    return _step("layer", f"model.moe.elastic.budget={k * arm_config('layer').model.num_layers}")


def _step(arm: str, override: str) -> Callable[[], object]:
    return training_step(arm_config(arm, [override]))
