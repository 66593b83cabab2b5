"""Opens token stores: a folder made by `prepare`, or a bare Megatron prefix.

A store gives its splits as memory maps (`TokenSplit`); `verify_store` checks every byte against the
manifest. Called by `build` and by `dmoe data prepare`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from dmoe.config.base import ConfigError
from dmoe.data.indexed import bin_path, idx_path, read_indexed
from dmoe.data.manifest import (
    CHUNK_BYTES,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    SplitName,
    read_manifest,
)


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split of a store, memory-mapped."""

    source: str
    """The path or name the user gave."""
    fingerprint: str
    """Names the data of the store."""
    path: Path
    """The `.bin` file, for error messages."""
    ids: np.ndarray
    """(N,) token ids, read-only."""
    document_starts: np.ndarray
    """(documents + 1,) int64 positions in `ids`; the last is N."""
    text_bytes: int | None
    """UTF-8 bytes of the text; None for a foreign file, which does not say."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the split."""
        return self.ids.size

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return self.document_starts.size - 1

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """Turn the mean loss of a token into bits per byte of the text; None if that is unknown."""
        if self.text_bytes is None:
            return None
        return nats_per_token / log(2) * self.num_tokens / self.text_bytes


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An open store."""

    source: str
    """The path or name the user gave."""
    fingerprint: str
    """Names the data."""
    manifest: Manifest | None
    """None for a foreign Megatron prefix: its bytes can not be verified."""
    splits: dict[SplitName, TokenSplit]
    """What the store holds; a foreign prefix is all `train`."""

    def split(self, name: SplitName) -> TokenSplit:
        """Return a split.

        Raises:
            ConfigError: if the store does not have it.
        """
        if name not in self.splits:
            raise ConfigError(
                f"{self.source} has no {name!r} split (it has {', '.join(self.splits)}): prepare "
                "it with a holdout, or set data.valid to a store of held-out text"
            )
        return self.splits[name]


def open_store(path: str | Path, *, source: str | None = None) -> TokenStore:
    """Open a store folder or a Megatron prefix and check headers and sizes, not hashes.

    Args:
        path: the folder, or the path of a `.bin/.idx` pair without its ending.
        source: the name to show for it, by default the path.

    Raises:
        ConfigError: naming the file, and the byte offset where there is one.
    """
    path = Path(path)
    source = source or str(path)
    if path.is_dir():
        return _open_folder(path, source)
    if idx_path(path).exists():
        return _open_prefix(path, source)
    raise ConfigError(
        f"data source {source}: neither a store folder with {MANIFEST_NAME} nor a Megatron prefix "
        f"(no {idx_path(path).name} beside it); make a store with `dmoe data prepare`"
    )


def verify_store(
    folder: str | Path,
    *,
    splits: Iterable[SplitName] | None = None,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Compare the bytes of a store with the hashes of its manifest.

    Args:
        folder: the store folder.
        splits: which to read, by default all.
        rank: this process among those that share the work. A process that finds damage raises
            alone; the caller must make that known to the others.
        world: how many share it; they must see the same disk.

    Returns:
        How many chunks this process hashed.

    Raises:
        ConfigError: naming the first bad file, and for altered bytes the chunk.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = _check_sizes(folder, manifest)
    expected = {MANIFEST_NAME, *(path.name for path in files)}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in expected)
    if extra:
        raise ConfigError(f"{folder / extra[0]}: is not in the manifest; remove it")
    chosen = {path for name in splits or manifest.splits for path in _split_paths(folder, name)}
    work = [
        (path, chunk, sha256)
        for path, record in files.items()
        if path in chosen
        for chunk, sha256 in enumerate(record.chunks)
    ]
    for path, chunk, sha256 in work[rank::world]:
        _verify_chunk(path, chunk, sha256)
    return len(work[rank::world])


def _verify_chunk(path: Path, chunk: int, sha256: str) -> None:
    with path.open("rb") as file:
        file.seek(chunk * CHUNK_BYTES)
        content = file.read(CHUNK_BYTES)
    if hashlib.sha256(content).hexdigest() != sha256:
        start = chunk * CHUNK_BYTES
        raise ConfigError(
            f"{path}: altered between byte {start} and byte {start + len(content)}: the SHA-256 "
            f"is not the one in {MANIFEST_NAME}; restore the file, or prepare the store again"
        )


def _open_folder(folder: Path, source: str) -> TokenStore:
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    splits: dict[SplitName, TokenSplit] = {}
    for name, record in manifest.splits.items():
        prefix = folder / name
        ids, starts = read_indexed(prefix)
        if (ids.size, starts.size - 1) != (record.tokens, record.documents):
            raise ConfigError(
                f"{idx_path(prefix)}: describes {ids.size} tokens in {starts.size - 1} documents, "
                f"but {MANIFEST_NAME} {record.tokens} in {record.documents}"
            )
        splits[name] = TokenSplit(
            source, manifest.fingerprint, bin_path(prefix), ids, starts, record.text_bytes
        )
    return TokenStore(source, manifest.fingerprint, manifest, splits)


def _open_prefix(prefix: Path, source: str) -> TokenStore:
    ids, starts = read_indexed(prefix)
    # All that can be known without reading every token: the boundaries and the type.
    content = hashlib.sha256(str(ids.dtype).encode() + starts.tobytes())
    fingerprint = f"unverified-{content.hexdigest()}"
    split = TokenSplit(source, fingerprint, bin_path(prefix), ids, starts, text_bytes=None)
    return TokenStore(source, fingerprint, None, {"train": split})


def _check_sizes(folder: Path, manifest: Manifest) -> dict[Path, FileRecord]:
    """Return the record of every file of the store, all present, in place and of the right size."""
    files: dict[Path, FileRecord] = {}
    for name, split in manifest.splits.items():
        files |= zip(_split_paths(folder, name), (split.bin, split.idx), strict=True)
    for path, record in files.items():
        if not path.is_file():
            raise ConfigError(f"{path}: missing, but {MANIFEST_NAME} lists it")
        if path.resolve().parent != folder.resolve():
            raise ConfigError(f"{path}: a link that leaves the store folder")
        if (size := path.stat().st_size) != record.bytes:
            raise ConfigError(
                f"{path}: ends at byte {size}, but {MANIFEST_NAME} says {record.bytes} bytes"
            )
    return files


def _split_paths(folder: Path, name: SplitName) -> tuple[Path, Path]:
    return bin_path(folder / name), idx_path(folder / name)
