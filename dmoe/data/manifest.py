"""What a token store says about itself: `manifest.json`, with hashes that locate altered bytes.

Written by `preparation`, read and checked by `store`.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from dmoe.config.base import ConfigError, ConfigModel

MANIFEST_NAME = "manifest.json"
CHUNK_BYTES = 16 << 20
"""A whole file is hashed, and each piece of this size, so that damage is located."""

SplitName = Literal["train", "valid"]


class FileRecord(ConfigModel):
    """Size and SHA-256 of one file."""

    bytes: int
    """Size."""
    sha256: str
    """Of the whole file, as `sha256sum` prints it."""
    chunks: tuple[str, ...]
    """SHA-256 of each 16 MiB piece."""


class SplitRecord(ConfigModel):
    """One split: its two files and what they hold."""

    documents: int
    """Documents."""
    tokens: int
    """Tokens, with one end-of-document mark a document."""
    text_bytes: int
    """UTF-8 bytes of the text the tokens stand for: the denominator of bits per byte."""
    bin: FileRecord
    """`SPLIT.bin`."""
    idx: FileRecord
    """`SPLIT.idx`."""


class TokenizerRecord(ConfigModel):
    """The tokenizer that made the ids."""

    spec: str
    """What `load_tokenizer` was given; only the fingerprint says whether it is the same."""
    fingerprint: str
    """`Tokenizer.fingerprint`."""
    vocab_size: int
    """Largest id plus one."""
    eod_id: int
    """The id that ends every document."""


class CorpusRecord(ConfigModel):
    """One input of `prepare`."""

    name: str
    """Path or name of the input."""
    fingerprint: str
    """SHA-256 of its content, or the fingerprint its library gives it."""


class Request(ConfigModel):
    """Everything that decides the content of a store: an equal request makes an equal store."""

    corpora: tuple[CorpusRecord, ...]
    """The inputs, in order."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    holdout: float
    """Fraction of documents in the `valid` split."""
    text_key: str
    """Field or column that holds the text."""
    split_paragraphs: bool
    """Whether blank lines of a .txt file part its documents."""


class Manifest(ConfigModel):
    """The whole of `manifest.json`."""

    format: Literal[1] = 1
    """Version of this file."""
    fingerprint: str
    """SHA-256 over the tokenizer's fingerprint and all splits: names the data of this store."""
    tokenizer: TokenizerRecord
    """What made the ids."""
    splits: dict[SplitName, SplitRecord]
    """`train`, and `valid` where documents were held out."""
    skipped_documents: int
    """Documents without text, which are not in the store."""
    request: Request
    """What `prepare` was asked for."""

    @property
    def total_tokens(self) -> int:
        """Tokens over all splits."""
        return sum(split.tokens for split in self.splits.values())


def store_fingerprint(tokenizer: TokenizerRecord, splits: dict[SplitName, SplitRecord]) -> str:
    """Return the SHA-256 that names the data of a store, whatever folder it lies in."""
    content = {name: split.model_dump(mode="json") for name, split in splits.items()}
    text = json.dumps([tokenizer.fingerprint, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store folder.

    Raises:
        ConfigError: if it is missing, malformed, or was edited after it was written.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        raise ConfigError(f"{path}: at {where}: {first['msg']}") from None
    if manifest.fingerprint != store_fingerprint(manifest.tokenizer, manifest.splits):
        raise ConfigError(f"{path}: the content does not have its fingerprint: it was altered")
    return manifest


def hash_file(path: Path) -> FileRecord:
    """Return the size of a file, its SHA-256, and the SHA-256 of each of its chunks."""
    whole, chunks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
            chunks.append(hashlib.sha256(chunk).hexdigest())
            size += len(chunk)
    return FileRecord(bytes=size, sha256=whole.hexdigest(), chunks=tuple(chunks))
