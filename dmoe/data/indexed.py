"""Megatron's indexed token files: `PREFIX.bin` holds tokens, `PREFIX.idx` where documents start.

The index is: magic, u64 version, u8 token type, u64 sequences n, u64 document indices m, i32
lengths[n], i64 byte pointers[n], i64 document_indices[m], and in multimodal files i8 modes[n].
A document is a range of sequences; here always one. Called by `preparation` and `store`.
"""

import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from dmoe.config.base import ConfigError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}


def bin_path(prefix: Path) -> Path:
    """Return where the tokens of a prefix are; the prefix itself may hold dots."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return where the index of a prefix is."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Streams documents into a `.bin/.idx` pair; a context manager that commits on a clean exit.

    Both files are written under temporary names, synced and renamed, the index last: a pair that
    has an index is whole.

    Args:
        prefix: path of the pair without `.bin`.
        vocab_size: decides the width of a token, 2 bytes where that is enough and 4 otherwise.
        eod_id: appended to every document.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, eod_id: int):
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._eod_id = eod_id
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
        self._lengths = array("i")
        self._bin = _part(bin_path(prefix)).open("wb")

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, ids: np.ndarray) -> None:
        """Append one document: (N,) ids, without the end-of-document mark."""
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < self._vocab_size
        self._bin.write(np.append(ids, self._eod_id).astype(self._dtype).tobytes())
        self._lengths.append(ids.size + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        paths = (bin_path(self._prefix), idx_path(self._prefix))
        if kind is not None:
            self._bin.close()
            _part(paths[0]).unlink()
            return
        _sync_and_close(self._bin)
        index = _part(paths[1]).open("wb")
        index.write(self._index())
        _sync_and_close(index)
        for path in paths:
            _part(path).rename(path)

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, "<i4")
        n = lengths.size
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        pointers = np.concatenate((np.zeros(min(n, 1), "<i8"), ends[:-1]))
        header = _HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self._dtype], n, n + 1)
        sections = (lengths, pointers, np.arange(n + 1, dtype="<i8"))
        return header + b"".join(section.tobytes() for section in sections)


def read_indexed(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Map a `.bin/.idx` pair and check its two files against each other.

    Args:
        prefix: path of the pair without `.bin`.

    Returns:
        The tokens as a read-only memory map (N,), and where each document starts among them,
        (documents + 1,) int64.

    Raises:
        ConfigError: naming the file and the byte offset at which it stops making sense.
    """
    index = idx_path(prefix)
    dtype, lengths, pointers, documents = _read_index(index)
    itemsize = dtype.itemsize
    n = lengths.size
    lengths_at, pointers_at, documents_at = _section_offsets(n)
    _check_none(lengths < 0, index, lengths_at, 4, "a negative sequence length")
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
    _check_none(
        pointers != starts[:-1] * itemsize,
        index,
        pointers_at,
        8,
        "a byte pointer that does not continue the sequence before it",
    )
    bounds = np.concatenate((np.zeros(1, np.int64), documents))
    beyond = (documents < bounds[:-1]) | (documents > n)
    beyond[0] |= documents[0] != 0
    beyond[-1] |= documents[-1] != n
    _check_none(beyond, index, documents_at, 8, "a document boundary out of order")

    tokens = bin_path(prefix)
    size, expected = _size(tokens), int(starts[-1]) * itemsize
    if size != expected:
        state = "ends early, at" if size < expected else "has extra bytes: it ends at"
        raise ConfigError(
            f"{tokens}: {state} byte {size}, but {index.name} describes {expected} bytes "
            f"({starts[-1]} tokens of {itemsize} bytes)"
        )
    if starts[-1] < 2:
        raise ConfigError(f"{tokens}: holds {starts[-1]} tokens, so there is nothing to predict")
    return np.memmap(tokens, dtype, mode="r"), starts[documents]


def _read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    """Return the token type, lengths (n,), pointers (n,) and document indices (m,) of an index."""
    size = _size(path)
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ConfigError(f"{path}: ends at byte {size}, inside its {_HEADER.size}-byte header")
    magic, version, code, n, m = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ConfigError(f"{path}: byte 0: not a Megatron index (starts with {magic!r})")
    if version != _VERSION:
        raise ConfigError(f"{path}: byte 9: index version {version}, only {_VERSION} is known")
    if code not in _DTYPE_OF_CODE:
        raise ConfigError(
            f"{path}: byte 17: token type code {code} is not one of {sorted(_DTYPE_OF_CODE)}"
        )
    lengths_at, pointers_at, documents_at = _section_offsets(n)
    expected = documents_at + 8 * m
    # Multimodal files end with one mode byte a sequence; text needs nothing from it.
    if m < 1 or size not in (expected, expected + n):
        raise ConfigError(
            f"{path}: ends at byte {size}, but its header (bytes 18-33: {n} sequences, "
            f"{m} document indices) describes {expected} bytes"
        )
    raw = np.memmap(path, np.uint8, mode="r")
    return (
        _DTYPE_OF_CODE[code],
        raw[lengths_at:pointers_at].view("<i4"),
        raw[pointers_at:documents_at].view("<i8"),
        raw[documents_at:expected].view("<i8"),
    )


def _section_offsets(n: int) -> tuple[int, int, int]:
    """Return the byte at which lengths, pointers and document indices start."""
    return _HEADER.size, _HEADER.size + 4 * n, _HEADER.size + 12 * n


def _check_none(bad: np.ndarray, path: Path, start: int, itemsize: int, what: str) -> None:
    if bad.any():
        entry = int(np.argmax(bad))
        raise ConfigError(f"{path}: byte {start + entry * itemsize}: {what} (entry {entry})")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())
