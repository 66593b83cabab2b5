from math import log

import numpy as np
import pytest

from dmoe.config.base import ConfigError
from dmoe.data import bigram as bigram_module
from dmoe.data.bigram import bigram_baseline
from dmoe.data.evaluation import eval_batches


def test_by_hand(make_split):
    """Train pairs: 0->1 twice, 1->0 once. Valid pairs: 0->1 and 1->1. V = 2, a = 1."""
    train = make_split([[0, 1, 0], [0, 1]])
    valid = make_split([[0, 1, 1]])
    p0, p1 = 2 / 5, 3 / 5  # (1 + 1) / (3 + 2), (2 + 1) / (3 + 2)
    p1_after_0 = (2 + 2 * p1) / (2 + 2)
    p1_after_1 = (0 + 2 * p1) / (1 + 2)
    assert p0 + p1 == 1
    result = bigram_baseline(train, valid, vocab_size=2)
    assert result.loss == pytest.approx(-(log(p1_after_0) + log(p1_after_1)) / 2)
    assert result.num_targets == 2
    assert result.bits_per_byte is None


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_predicts_what_evaluation_labels(numbered_split, monkeypatch, mask_documents, chunk):
    monkeypatch.setattr(bigram_module, "_CHUNK_TOKENS", chunk)
    options = {"vocab_size": 1000, "mask_documents": mask_documents}
    batches = eval_batches(numbered_split, seq_len=8, micro_batch_size=2, **options)
    pairs = np.zeros((1000, 1000), int)
    for batch in batches:
        labelled = batch.labels_BS >= 0
        np.add.at(pairs, (batch.tokens_BS[labelled], batch.labels_BS[labelled]), 1)
    counted = bigram_module._count_pairs(numbered_split, 1000, mask_documents)
    assert (counted == pairs).all()


def test_bits_per_byte(make_store):
    from dmoe.data.store import open_store

    store = open_store(make_store([f"the cat sat on mat {i}" for i in range(100)]))
    train, valid = store.split("train"), store.split("valid")
    result = bigram_baseline(train, valid, vocab_size=257)
    assert 0 < result.loss < log(257) / 2
    assert result.bits_per_byte == valid.bits_per_byte(result.loss)
    assert result.num_targets == valid.num_tokens - valid.num_documents


def test_large_vocabulary(make_split):
    split = make_split([[1, 2]])
    with pytest.raises(ConfigError, match="not for 50000 ids"):
        bigram_baseline(split, split, vocab_size=50_000)
