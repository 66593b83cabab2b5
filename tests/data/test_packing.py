"""Packing against its plain meaning: join the documents, cut, and look back for each position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.base import ConfigError
from dmoe.data.packing import PackedDataset, cut_window, file_layout
from dmoe.data.store import TokenSplit


def plain_window(documents, start, seq_len, mask_documents):
    """Return tokens, labels, positions and document ids of one window, token by token."""
    joined = [(d, p, token) for d, text in enumerate(documents) for p, token in enumerate(text)]
    rows, seen = [], []
    for i in range(start, start + seq_len):
        if i + 1 >= len(joined):
            rows.append((0, -100, 0, -1))
            continue
        document, place, token = joined[i]
        if document not in seen:
            seen.append(document)
        crosses = joined[i + 1][0] != document
        if mask_documents:
            label = -100 if crosses else joined[i + 1][2]
            rows.append((token, label, min(place, i - start), seen.index(document)))
        else:
            rows.append((token, joined[i + 1][2], i - start, 0))
    return [list(column) for column in zip(*rows, strict=True)]


def as_lists(sample):
    return [
        values.tolist()
        for values in (sample.tokens, sample.labels, sample.positions, sample.document_ids)
    ]


@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=8).filter(
        lambda documents: sum(map(len, documents)) > 1
    ),
    seq_len=st.integers(1, 9),
    mask_documents=st.booleans(),
)
def test_windows_equal_the_plain_meaning(documents, seq_len, mask_documents):
    from pathlib import Path

    ids = np.array([token for document in documents for token in document], np.uint16)
    starts = np.cumsum([0, *map(len, documents)])
    split = TokenSplit("s", "f", Path("s.bin"), ids, starts, None)
    for window in range(-(-(ids.size - 1) // seq_len)):
        sample = cut_window(
            split,
            file_layout(split),
            window,
            seq_len=seq_len,
            vocab_size=100,
            mask_documents=mask_documents,
        )
        assert as_lists(sample) == plain_window(
            documents, window * seq_len, seq_len, mask_documents
        )


def make_dataset(split, **options):
    return PackedDataset(split, **{"seq_len": 8, "seed": 3, "vocab_size": 1000, **options})


def test_epoch_is_the_split_once(numbered_split):
    """With distinct tokens: none is seen twice in an epoch, and all but the tail are seen."""
    dataset = make_dataset(numbered_split)
    for epoch in range(3):
        first = epoch * dataset.num_windows
        samples = [dataset[first + i] for i in range(dataset.num_windows)]
        tokens = np.concatenate([sample.tokens for sample in samples])
        assert len(set(tokens)) == tokens.size
        assert numbered_split.num_tokens - tokens.size <= 8
        assert all((sample.document_ids >= 0).all() for sample in samples)


def test_documents_stay_whole_and_in_order(numbered_split):
    dataset = make_dataset(numbered_split)
    for n in range(dataset.num_windows):
        sample = dataset[n]
        same = sample.document_ids[1:] == sample.document_ids[:-1]
        assert (np.diff(sample.tokens)[same] == 1).all()
        assert (sample.labels[:-1][same] == sample.tokens[1:][same]).all()
        assert (sample.labels[:-1][~same] == -100).all()
        assert (sample.positions[1:][~same] == 0).all()


def test_order_is_a_pure_function_of_the_number(numbered_split):
    straight = make_dataset(numbered_split)
    count = 3 * straight.num_windows
    expected = [as_lists(straight[n]) for n in range(count)]
    scattered = make_dataset(numbered_split)
    for n in np.random.default_rng(1).permutation(count):
        assert as_lists(scattered[int(n)]) == expected[n]


def test_epochs_and_seeds_differ(numbered_split):
    dataset = make_dataset(numbered_split)
    epochs = [
        [as_lists(dataset[e * dataset.num_windows + i]) for i in range(dataset.num_windows)]
        for e in range(2)
    ]
    other = make_dataset(numbered_split, seed=4)
    third = [as_lists(other[i]) for i in range(other.num_windows)]
    assert epochs[0] != epochs[1] != third != epochs[0]


def test_split_shorter_than_a_window(numbered_split):
    n = numbered_split.num_tokens
    assert make_dataset(numbered_split, seq_len=n - 1).num_windows == 1
    message = rf"memory\.bin holds {n} tokens, .* train\.seq_len \+ 1 = {n + 1}"
    with pytest.raises(ConfigError, match=message):
        make_dataset(numbered_split, seq_len=n)


def test_id_beyond_the_vocabulary_is_located(make_split):
    split = make_split([[1, 2, 3], [4, 500, 6]])
    message = r"memory\.bin: token 4 \(byte 8\) has id 500, outside model\.vocab_size 257"
    with pytest.raises(ConfigError, match=message):
        make_dataset(split, seq_len=5, vocab_size=257)[0]
    assert make_dataset(split, seq_len=5, vocab_size=501)[0].tokens.max() == 500
