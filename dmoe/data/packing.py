"""Packs documents into windows of `seq_len` tokens: they are laid end to end and cut.

`PackedDataset` gives training samples, epoch after epoch, as a pure function of the sample number;
`cut_window` is shared with `evaluation`. Shape letters: S sequence, N tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.data.store import TokenSplit
from dmoe.rng import numpy_generator

IGNORED_LABEL = -100
"""The label of a position that is not predicted."""
PADDING_DOCUMENT = -1
"""The document id of a position that holds no token."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One window, all (S,) int64."""

    tokens: np.ndarray
    """Ids; 0 in padding."""
    labels: np.ndarray
    """The id that follows, or `IGNORED_LABEL`."""
    positions: np.ndarray
    """Distance from the start of the document, or of the window that cuts it."""
    document_ids: np.ndarray
    """0 and up within the window, or `PADDING_DOCUMENT`."""


class SourceRecord(ConfigModel):
    """What a resumed run must find again of one source."""

    path: str
    """What the user called it."""
    fingerprint: str
    """Names its data."""
    share: int
    """Samples it has in a block of a blend; 1 where it is the only source."""


class Dataset(Protocol):
    """An endless sequence of samples, each a pure function of its number."""

    seq_len: int
    """Tokens in a sample."""
    seed: int
    """Of the order."""

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """What the samples come from."""
        ...

    def __getitem__(self, n: int) -> Sample:
        """Return sample `n`."""
        ...


@dataclass(frozen=True, eq=False)
class Layout:
    """An order of the documents of a split, laid end to end."""

    documents: np.ndarray
    """(documents,) the document at each place."""
    starts: np.ndarray
    """(documents + 1,) where each place starts, in tokens."""


@dataclass(frozen=True, eq=False)
class _Epoch:
    number: int
    layout: Layout
    windows: np.ndarray
    """(windows,) the window that each sample of the epoch is."""


class PackedDataset:
    """Windows of one split; sample `n` depends on (data, seq_len, seed, n) alone.

    In every epoch the documents are shuffled and joined, the result is cut into windows, and the
    windows are shuffled. The tail that does not fill a window, another in each epoch, is left out.
    Consecutive windows share one token, so every token is predicted once. The order of one epoch is
    held in memory: 16 bytes a document and 8 a window.

    Args:
        split: what to read.
        seq_len: S, tokens in a window.
        seed: of the order.
        vocab_size: of the model; an id beyond it is an error when it is read.
        mask_documents: whether documents in a window are separate.

    Raises:
        ConfigError: if the split does not fill one window.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        seed: int,
        vocab_size: int,
        mask_documents: bool = True,
    ):
        self.num_windows = (split.num_tokens - 1) // seq_len
        if self.num_windows < 1:
            raise ConfigError(
                f"{split.path} holds {split.num_tokens} tokens, fewer than one window of "
                f"train.seq_len + 1 = {seq_len + 1}: shorten train.seq_len or add text"
            )
        self.split = split
        self.seq_len = seq_len
        self.seed = seed
        self._vocab_size = vocab_size
        self._mask_documents = mask_documents
        self._epoch = self._shuffle(0)

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """The one source."""
        split = self.split
        return (SourceRecord(path=split.source, fingerprint=split.fingerprint, share=1),)

    def __getitem__(self, n: int) -> Sample:
        """Return sample `n`, which is any number: epoch after epoch follows."""
        number, i = divmod(n, self.num_windows)
        # One local reference: another thread may move the cache on to the next epoch.
        epoch = self._epoch
        if epoch.number != number:
            epoch = self._epoch = self._shuffle(number)
        return cut_window(
            self.split,
            epoch.layout,
            int(epoch.windows[i]),
            seq_len=self.seq_len,
            vocab_size=self._vocab_size,
            mask_documents=self._mask_documents,
        )

    def _shuffle(self, epoch: int) -> _Epoch:
        generator = numpy_generator(self.seed, "data", epoch)
        documents = generator.permutation(self.split.num_documents)
        lengths = np.diff(self.split.document_starts)[documents]
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        return _Epoch(epoch, Layout(documents, starts), generator.permutation(self.num_windows))


def file_layout(split: TokenSplit) -> Layout:
    """Return the documents in the order of the file."""
    return Layout(np.arange(split.num_documents), split.document_starts)


def cut_window(
    split: TokenSplit,
    layout: Layout,
    window: int,
    *,
    seq_len: int,
    vocab_size: int,
    mask_documents: bool,
) -> Sample:
    """Return one window of a layout, padded where the layout ends before it.

    Args:
        split: what to read.
        layout: the order of its documents.
        window: covers the tokens from `window * seq_len`, and one more for the last label.
        seq_len: S.
        vocab_size: ids must be below it.
        mask_documents: whether positions start again, and no label crosses, at a document's start.

    Raises:
        ConfigError: naming file and offset of an id that the model does not have.
    """
    start = window * seq_len
    place = np.arange(start, min(start + seq_len + 1, split.num_tokens))
    first, last = np.searchsorted(layout.starts, (place[0], place[-1]), side="right") - 1
    nearby = layout.starts[first : last + 1]
    run = np.searchsorted(nearby, place, side="right") - 1
    in_document = place - nearby[run]
    index = split.document_starts[layout.documents[first : last + 1]][run] + in_document
    ids = split.ids[index].astype(np.int64)
    _check_ids(split, ids, index, vocab_size)

    if mask_documents:
        opens = run[1:] != run[:-1]
        positions = np.minimum(in_document, place - start)
    else:
        opens = np.zeros(place.size - 1, bool)
        positions = place - start
    document_ids = np.cumsum(np.concatenate(([False], opens)))

    def padded(values: np.ndarray, padding: int) -> np.ndarray:
        result = np.full(seq_len, padding, np.int64)
        result[: values.size] = values
        return result

    return Sample(
        tokens=padded(ids[:-1], 0),
        labels=padded(np.where(opens, IGNORED_LABEL, ids[1:]), IGNORED_LABEL),
        positions=padded(positions[:-1], 0),
        document_ids=padded(document_ids[:-1], PADDING_DOCUMENT),
    )


def _check_ids(split: TokenSplit, ids: np.ndarray, index: np.ndarray, vocab_size: int) -> None:
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        at = int(np.argmax(bad))
        byte = index[at] * split.ids.itemsize
        raise ConfigError(
            f"{split.path}: token {index[at]} (byte {byte}) has id {ids[at]}, "
            f"outside model.vocab_size {vocab_size}: raise that, or restore the file"
        )
