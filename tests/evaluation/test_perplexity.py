"""The held-out loss against a loop over tokens, for any micro-batch size and number of ranks."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe.data import MicroBatch, TokenSplit, eval_batches
from dmoe.evaluation import EvalResult, evaluate, evaluate_split
from dmoe.models import DecoderLM, ModelConfig, ModelInputs, build_model
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

SEQ_LEN = 8
CONFIG = ModelConfig.model_validate(
    {
        "vocab_size": 19,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 16,
        "init_std": 0.3,
        "moe": {
            "num_experts": 4,
            "expert_ffn_dim": 8,
            "router": {"name": "top_k", "top_k": 2, "jitter": 0.1},
            "losses": {"load_balance_weight": 0.1, "z_loss_weight": 0.01},
        },
    }
)


def build(dims: ParallelDims | None = None) -> DecoderLM:
    return build_model(CONFIG, dims=dims, compute_dtype=torch.float64, seed=2)


def split() -> TokenSplit:
    """Documents of 0 to 16 tokens, 101 in all: the last window is cut short."""
    lengths = [*np.random.default_rng(0).integers(0, 17, size=11).tolist()]
    lengths.append(101 - sum(lengths))
    return TokenSplit(
        source="memory",
        fingerprint="",
        path=Path("memory.bin"),
        ids=np.random.default_rng(1).integers(0, 19, size=101).astype(np.uint16),
        document_starts=np.cumsum([0, *lengths]),
        text_bytes=90,
    )


def loss_by_hand(model: DecoderLM, data: TokenSplit, mask_documents: bool) -> tuple[float, int]:
    """Read each piece of text alone: a window, or where masked the part of a document in it."""
    cuts = set(range(0, data.num_tokens - 1, SEQ_LEN))
    starts = set(data.document_starts.tolist()) if mask_documents else set()
    edges = sorted(cuts | (starts - {data.num_tokens}) | {data.num_tokens - 1})
    ids = data.ids.astype(np.int64)
    nats, num_targets = 0.0, 0
    for first, end in pairwise(edges):
        with torch.no_grad():
            logits = model(ModelInputs(torch.tensor(ids[first:end])[None])).logits[0]
        for n, predicted in zip(range(first + 1, end + 1), logits.log_softmax(-1), strict=True):
            if n not in starts:
                nats -= predicted[ids[n]].item()
                num_targets += 1
    return nats / num_targets, num_targets


@pytest.mark.parametrize("mask_documents", [True, False])
def test_every_token_counts_once(mask_documents):
    model, data = build(), split()
    loss, num_targets = loss_by_hand(model, data, mask_documents)
    for micro_batch_size in (1, 3, 40):
        result = evaluate_split(
            model,
            data,
            seq_len=SEQ_LEN,
            micro_batch_size=micro_batch_size,
            mask_documents=mask_documents,
        )
        assert result.loss == pytest.approx(loss, abs=1e-9)
        assert result.num_targets == num_targets
        assert result.perplexity == pytest.approx(math.exp(loss))
        assert result.bits_per_byte == pytest.approx(loss / math.log(2) * 101 / 90)


@pytest.mark.parametrize(("k", "k_mean"), [(None, 2), (1, 1), (4, 4), ([3, 1], 2)])
def test_the_mean_number_of_experts_is_that_of_the_tokens(k, k_mean):
    """Padding, of which the last window has some, has no experts and is not counted."""
    model = build()
    model.set_k(k)
    batches = eval_batches(split(), seq_len=SEQ_LEN, micro_batch_size=3, vocab_size=19)
    assert evaluate(model, batches).k_mean == k_mean


def test_experts_that_were_skipped_or_full_do_not_count():
    model = build()
    batches = list(eval_batches(split(), seq_len=SEQ_LEN, micro_batch_size=2, vocab_size=19))
    model.set_gate_threshold(0.9)
    assert 1 <= evaluate(model, batches).k_mean < 2
    capped = {**CONFIG.model_dump()["moe"], "capacity": {"factor": 0.5}}
    config = ModelConfig.model_validate({**CONFIG.model_dump(), "moe": capped})
    assert 0 < evaluate(build_model(config, compute_dtype=torch.float64), batches).k_mean < 2


def test_a_dense_model_has_no_number_of_experts():
    config = ModelConfig.model_validate({**CONFIG.model_dump(), "moe": None})
    batches = eval_batches(split(), seq_len=SEQ_LEN, micro_batch_size=2, vocab_size=19)
    assert evaluate(build_model(config), batches).k_mean is None


def measure() -> list[EvalResult]:
    dims = ParallelDims.create(ep=torch.distributed.get_world_size())
    return [
        evaluate_split(
            build(dims),
            split(),
            seq_len=SEQ_LEN,
            micro_batch_size=micro_batch_size,
            dims=dims,
            max_batches=max_batches,
        )
        # With 13 windows a batch, and with one batch, the second rank has nothing but padding.
        for micro_batch_size, max_batches in ((1, None), (13, None), (2, 1), (2, 3))
    ]


def measure_at_each_layers_k() -> EvalResult:
    dims = ParallelDims.create(ep=torch.distributed.get_world_size())
    model = build(dims)
    with model.at_k([3, 1]):
        return evaluate_split(model, split(), seq_len=SEQ_LEN, micro_batch_size=2, dims=dims)


def test_ranks_agree_at_any_k():
    first, second = run_distributed(measure_at_each_layers_k, 2)
    assert first == second
    model = build()
    own = evaluate_split(model, split(), seq_len=SEQ_LEN, micro_batch_size=2)
    model.set_k([3, 1])
    alone = evaluate_split(model, split(), seq_len=SEQ_LEN, micro_batch_size=2)
    assert first.loss == pytest.approx(alone.loss, abs=1e-9)
    assert first.k_mean == alone.k_mean == 2
    assert abs(own.loss - alone.loss) > 1e-3


def test_ranks_share_the_work_and_agree():
    first, second = run_distributed(measure, 2)
    assert first == second
    model, data = build(), split()
    sizes = {"seq_len": SEQ_LEN}
    whole = evaluate_split(model, data, **sizes, micro_batch_size=2)
    one = evaluate_split(model, data, **sizes, micro_batch_size=2, max_batches=1)
    three = evaluate_split(model, data, **sizes, micro_batch_size=2, max_batches=3)
    assert one.num_targets < three.num_targets < whole.num_targets
    for result, expected in zip(first, [whole, whole, one, three], strict=True):
        assert result.num_targets == expected.num_targets
        assert result.k_mean == 2
        assert result.loss == pytest.approx(expected.loss, abs=1e-9)


def test_evaluation_leaves_no_trace():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = evaluate_split(model, split(), seq_len=SEQ_LEN, micro_batch_size=2)
    again = evaluate_split(model, split(), seq_len=SEQ_LEN, micro_batch_size=2)
    assert result == again, "noise of training in evaluation"
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_without_a_target_are_an_error():
    (batch, *_) = eval_batches(split(), seq_len=SEQ_LEN, micro_batch_size=1, vocab_size=19)
    empty = MicroBatch(
        0,
        batch.sample_ids_B,
        batch.tokens_BS,
        torch.full_like(batch.labels_BS, -100),
        batch.positions_BS,
        batch.document_ids_BS,
    )
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(build(), [empty])


def test_text_of_unknown_size_has_no_bits_per_byte():
    batches = eval_batches(split(), seq_len=SEQ_LEN, micro_batch_size=4, vocab_size=19)
    assert evaluate(build(), batches).bits_per_byte is None


def test_a_diverged_model_has_infinite_perplexity():
    assert EvalResult(loss=1e4, num_targets=1).perplexity == math.inf
