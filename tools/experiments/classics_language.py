"""Ways of balancing and of choosing experts, compared on bytes of several domains.

    python tools/experiments/classics_language.py train --out runs/classics --data NAME=FILE ...
    python tools/experiments/classics_language.py report --out runs/classics --data NAME=FILE ...

Every micro-batch is of one domain, and a global batch has as many of each. `train` appends a line a
run to OUT/runs.jsonl and skips what is there, so it can be stopped and started again; `report`
writes docs/results/classics_language.md. Python's standard library is a domain in any case.
Times are CPU seconds of one thread, so that other work on the machine does not count.
Shape letters: L MoE layers, E experts, M domains.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from classics_language_report import write_report
from experiment_texts import texts_table

from dmoe.data import MicroBatch
from dmoe.data.corpora import BUILTIN_STDLIB, open_corpus
from dmoe.engine import EngineConfig, NativeEngine, StepPosition
from dmoe.metrics.moe_stats import load_max_over_mean
from dmoe.models import ModelConfig, ModelInputs
from dmoe.models.counts import num_active_params, num_params
from dmoe.models.decoder import lm_loss
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelDims

STEPS, LR, WARMUP = 400, 8e-3, 20
SEQ_LEN, SEQUENCES, PER_DOMAIN = 64, 12, 1
"""Tokens of a sequence, sequences of a micro-batch, micro-batches of a domain in a step."""
EVAL_EVERY, EVAL_BATCHES = 50, 8
"""Steps between measurements, and micro-batches of each domain in one."""
SEEDS = (0, 1, 2)
HELD_OUT = 0.1
"""The last share of a domain, which no step sees."""
MAX_BYTES = 1_200_000

SIZES = {"vocab_size": 257, "dim": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 128}
SIXTEEN = {"num_experts": 16, "expert_ffn_dim": 64, "router": {"name": "top_k", "top_k": 2}}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "balance": {
        "none": {"losses": {"load_balance_weight": 0.0}},
        "micro-batch loss": {
            "losses": {"load_balance_weight": 0.01, "load_balance_scope": "micro_batch"}
        },
        "global-batch loss": {"losses": {"load_balance_weight": 0.01}},
        "loss-free bias": {
            "router": {"name": "top_k", "top_k": 2, "bias_update_rate": 0.01},
            "losses": {"load_balance_weight": 0.0},
        },
    },
    # 128 gated neurons a token, of 1,024: 24,576 active parameters of experts a layer; with PEER
    # 144 neurons of two vectors each, of 39 x 39, and 8 queries: together 1% more than top-4.
    "choice": {
        "top-1": {
            "num_experts": 8,
            "expert_ffn_dim": 128,
            "router": {"name": "top_k", "top_k": 1, "normalize": False},
        },
        "top-2": {"router": {"name": "top_k", "top_k": 2}},
        "top-4": {
            "num_experts": 32,
            "expert_ffn_dim": 32,
            "router": {"name": "top_k", "top_k": 4},
        },
        "ReMoE": {
            "num_experts": 32,
            "expert_ffn_dim": 32,
            "router": {
                "name": "relu",
                "target_k": 4,
                "penalty": 1e-5,
                "penalty_factor": 1.0185,
            },
        },
        "expert threshold": {
            "num_experts": 32,
            "expert_ffn_dim": 32,
            "router": {"name": "expert_threshold", "target_k": 4, "decay": 0.9},
        },
        "PEER": {
            "num_experts": 39 * 39,
            "expert_ffn_dim": 1,
            "router": {"name": "peer", "heads": 8, "top_k": 18, "query_dim": 16},
        },
    },
}

Json = dict[str, Any]
app = typer.Typer(add_completion=False)


class Domains:
    """Texts as bytes; the same windows for every arm of a seed."""

    def __init__(self, paths: dict[str, str], seq_len: int):
        self.seq_len, self.names = seq_len, list(paths)
        self.texts = [np.frombuffer(_read(path), np.uint8) for path in paths.values()]

    def batch(self, domain: int, index: int, generator: np.random.Generator, *, held_out: bool):
        """Return a micro-batch of windows of one domain at random."""
        text = self.texts[domain]
        border = int(len(text) * (1 - HELD_OUT))
        text = text[border:] if held_out else text[:border]
        starts = generator.integers(len(text) - self.seq_len - 1, size=SEQUENCES)
        rows = np.stack([text[start : start + self.seq_len + 1] for start in starts])
        ids_BS = torch.from_numpy(rows.astype(np.int64))
        positions_BS = torch.arange(self.seq_len).repeat(SEQUENCES, 1)
        sample_ids_B = index * SEQUENCES + torch.arange(SEQUENCES)
        documents_BS = torch.zeros_like(positions_BS)
        return MicroBatch(
            index, sample_ids_B, ids_BS[:, :-1], ids_BS[:, 1:], positions_BS, documents_BS
        )

    def step(self, generator: np.random.Generator) -> list[MicroBatch]:
        """Return the micro-batches of a step, sorted by domain."""
        order = [m for m in range(len(self.names)) for _ in range(PER_DOMAIN)]
        return [self.batch(m, i, generator, held_out=False) for i, m in enumerate(order)]


def _read(path: str) -> bytes:
    corpus = open_corpus(path, text_key="text", split_paragraphs=False)
    text = "\n".join(corpus.documents()).encode()
    return text[:MAX_BYTES]


def run(experiment: str, arm: str, seed: int, domains: Domains, steps: int) -> Json:
    """Train one arm and return what was measured."""
    moe = {**SIXTEEN, **ARMS[experiment][arm]}
    config = ModelConfig.model_validate({**SIZES, "max_seq_len": domains.seq_len, "moe": moe})
    engine = NativeEngine(
        EngineConfig(),
        model=config,
        optim=OptimConfig(lr=LR),
        dims=ParallelDims(),
        device=torch.device("cpu"),
        seed=seed,
        recompute="none",
    )
    generator = np.random.default_rng(seed)
    seconds, violations, ks, curve = 0.0, [], [], []
    for step in range(steps):
        batches = domains.step(generator)
        began = time.process_time()
        position = StepPosition(seed, step, SEQUENCES * len(batches), len(batches))
        result = engine.forward_backward(batches, position)
        engine.clip(1.0)
        rate = LR * min(1, (step + 1) / WARMUP, 5 * (1 - step / steps))
        engine.step(rate, result)
        seconds += time.process_time() - began
        ks.append(float(result.counts_LE.sum()) / result.num_tokens / len(result.counts_LE))
        violations.append(float((load_max_over_mean(result.counts_LE) - 1).mean()))
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == steps:
            loss, counts_MLE = evaluate(engine, domains)
            curve.append({"step": step + 1, "seconds": seconds, "loss": loss})
    last = max(1, steps // 5)
    return {
        "experiment": experiment,
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "max_violation": float(np.mean(violations[-last:])),
        "mutual_information": mutual_information(counts_MLE),
        "mean_k": float(np.mean(ks[-last:])),
        "total_params": num_params(config),
        "active_params": num_active_params(config),
        "domains": domains.names,
    }


@torch.no_grad()
def evaluate(engine: NativeEngine, domains: Domains) -> tuple[float, np.ndarray]:
    """Return the mean held-out loss of the domains, in nats a byte, and (M, L, E) slots."""
    generator = np.random.default_rng(99)
    losses, counts = [], []
    for domain in range(len(domains.names)):
        for index in range(EVAL_BATCHES):
            batch = domains.batch(domain, index, generator, held_out=True)
            output = engine.model(ModelInputs(batch.tokens_BS))
            losses.append(float(lm_loss(output.logits, batch.labels_BS)) / batch.num_targets)
            counts.append(torch.stack([layer.stats.counts_E for layer in output.moe]))
    counts_MBLE = torch.stack(counts).view(len(domains.names), EVAL_BATCHES, *counts[0].shape)
    return float(np.mean(losses)), counts_MBLE.sum(1).double().numpy()


def mutual_information(counts_MLE: np.ndarray) -> float:
    """Return the mutual information of a slot's domain and its expert in bits, mean over layers."""
    informations = []
    for counts_ME in np.moveaxis(counts_MLE, 1, 0):
        joint_ME = counts_ME / counts_ME.sum()
        apart_ME = joint_ME.sum(1, keepdims=True) * joint_ME.sum(0, keepdims=True)
        used_ME = joint_ME > 0
        ratio = joint_ME[used_ME] / apart_ME[used_ME]
        informations.append(float((joint_ME[used_ME] * np.log2(ratio)).sum()))
    return float(np.mean(informations))


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    data: Annotated[list[str] | None, typer.Option(help="NAME=FILE of a domain; repeat.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = STEPS,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = len(SEEDS),
    only: Annotated[str | None, typer.Option(help='"balance" or "choice"; else both.')] = None,
) -> None:
    """Train all arms, one seed after the other."""
    torch.set_num_threads(1)
    paths = _paths(data)
    domains = Domains(paths, SEQ_LEN)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "runs.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(row["experiment"], row["arm"], row["seed"]) for row in map(json.loads, lines)}
    for seed in SEEDS[:seeds]:
        for experiment, arms in ARMS.items():
            for arm in arms:
                if (experiment, arm, seed) in done or only not in (None, experiment):
                    continue
                row = run(experiment, arm, seed, domains, steps) | {"steps": steps}
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{experiment}, {arm}, seed {seed}: {row['curve'][-1]}", flush=True)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    page: Annotated[Path, typer.Option(help="Where to write.")] = Path(
        "docs/results/classics_language.md"
    ),
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE of a domain, as in training, to name its files; repeat."),
    ] = None,
) -> None:
    """Write the page of all runs that are there."""
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    tokens_of_domain = SEQ_LEN * SEQUENCES * PER_DOMAIN
    balance, choice = list(ARMS["balance"]), list(ARMS["choice"])
    texts = _texts(data, rows[0]["domains"]) if data else ""
    write_report(rows, page, balance, choice, tokens_of_domain, texts=texts)


def _paths(data: list[str] | None) -> dict[str, str]:
    return dict(item.split("=", 1) for item in data or ()) | {"stdlib": BUILTIN_STDLIB}


def _texts(data: list[str], domains: list[str]) -> str:
    """Name the files of the domains, which have to be those of the runs."""
    paths = _paths(data)
    if list(paths) != domains:
        raise typer.BadParameter(f"the runs are of {domains}, and --data names {list(paths)}")
    return (
        f"\nTexts, as they were when this page was written; of each the first {MAX_BYTES:,} bytes "
        f"are used,\nof which the last {HELD_OUT:.0%} are held out:\n\n"
        f"{texts_table(paths, MAX_BYTES)}\n"
    )


if __name__ == "__main__":
    app()
