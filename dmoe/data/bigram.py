"""The bigram baseline: what a model of byte pairs reaches on the held-out split, for comparison.

Called by the trainer, for byte-level runs; a trained model must clearly beat it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dmoe.config.base import ConfigError
from dmoe.data.store import TokenSplit

MAX_VOCAB_SIZE = 2048
"""A table of all pairs is small, and well filled, only for bytes and their like."""
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class BigramResult:
    """How well the bigram model predicts the held-out split."""

    loss: float
    """Nats a predicted token."""
    bits_per_byte: float | None
    """The same in bits a byte of text; None where the split does not know its text."""
    num_targets: int
    """Predicted tokens: those that `eval_batches` labels."""


def bigram_baseline(
    train: TokenSplit,
    valid: TokenSplit,
    *,
    vocab_size: int,
    mask_documents: bool = True,
    pseudo_count: float = 1.0,
) -> BigramResult:
    """Count pairs in one split and predict another.

    With c the counts in `train`, a the pseudo-count and V the vocabulary:
    p(y) = (c(y) + a) / (sum(c) + a V) and p(y | x) = (c(x, y) + a V p(y)) / (c(x) + a V)

    Args:
        train: where pairs are counted.
        valid: where they are predicted.
        vocab_size: V, at most `MAX_VOCAB_SIZE`.
        mask_documents: whether the first token of a document is left out, as in training.
        pseudo_count: a, the weight of what is known before any pair is seen.

    Raises:
        ConfigError: if the vocabulary is too large for a table of pairs.
    """
    if vocab_size > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"the bigram baseline is for bytes (a vocabulary up to {MAX_VOCAB_SIZE}), not for "
            f"{vocab_size} ids"
        )
    counts = _count_pairs(train, vocab_size, mask_documents)
    prior = pseudo_count * vocab_size
    unigram = (counts.sum(0) + pseudo_count) / (counts.sum() + prior)
    bigram = (counts + prior * unigram) / (counts.sum(1, keepdims=True) + prior)
    targets = _count_pairs(valid, vocab_size, mask_documents)
    num_targets = int(targets.sum())
    loss = float(-(targets * np.log(bigram)).sum() / num_targets)
    return BigramResult(loss, valid.bits_per_byte(loss), num_targets)


def _count_pairs(split: TokenSplit, vocab_size: int, mask_documents: bool) -> np.ndarray:
    """Return (V, V) counts of each token (row) and the one that follows it (column)."""
    counts = np.zeros(vocab_size * vocab_size, np.int64)
    for before, after in _pairs(split, mask_documents):
        counts += np.bincount(before * vocab_size + after, minlength=counts.size)
    return counts.reshape(vocab_size, vocab_size)


def _pairs(split: TokenSplit, mask_documents: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, split.num_tokens - 1, _CHUNK_TOKENS):
        ids = split.ids[start : start + _CHUNK_TOKENS + 1].astype(np.int64)
        before, after = ids[:-1], ids[1:]
        if mask_documents:
            opening = split.document_starts - start - 1
            keep = np.ones(after.size, bool)
            keep[opening[(opening >= 0) & (opening < after.size)]] = False
            before, after = before[keep], after[keep]
        yield before, after
