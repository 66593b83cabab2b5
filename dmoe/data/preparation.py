"""Turns corpora into a token store: read, hold out, tokenize, write, hash, commit.

Called by `dmoe data prepare`, and by `build` for the built-in corpus.
"""

import hashlib
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from dmoe.config.base import ConfigError
from dmoe.data.corpora import BUILTIN_STDLIB, Corpus, open_corpus
from dmoe.data.indexed import IndexedWriter, bin_path, idx_path, read_indexed
from dmoe.data.manifest import (
    MANIFEST_NAME,
    CorpusRecord,
    Manifest,
    Request,
    SplitName,
    SplitRecord,
    TokenizerRecord,
    hash_file,
    store_fingerprint,
)
from dmoe.data.store import open_store
from dmoe.data.tokenizer import Tokenizer, load_tokenizer

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 8 << 20
_HASH_RANGE = 1 << 64
# The corpus has some 700 documents: one in a hundred would be too few to measure on.
_BUILTIN_HOLDOUT = 0.03


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "bytes",
    holdout: float = 0.01,
    text_key: str = "text",
    split_paragraphs: bool = False,
) -> Manifest:
    """Write a token store; the folder appears at once and whole, or not at all.

    A document is held out by the hash of its text, so equal documents never lie on both sides, and
    more input does not move a document. Documents of white space alone are skipped and counted. A
    killed run leaves a hidden folder `.OUTPUT.*` behind, which may be deleted.

    Args:
        inputs: corpora as `open_corpus` names them.
        output: the store folder. If it exists, an equal request returns it; another is an error.
        tokenizer: "bytes" or the path of a `tokenizer.json`.
        holdout: fraction of documents in the `valid` split, at least one; 0 for no such split.
        text_key: JSON key or column that holds the text.
        split_paragraphs: blank lines part the documents of .txt files.

    Raises:
        ConfigError: for unreadable input (naming file and place), for too few documents, or if
            `output` holds something else.
    """
    if not 0 <= holdout < 1:
        raise ConfigError(f"holdout is {holdout}, but must be at least 0 and less than 1")
    if not inputs:
        raise ConfigError("no input given")
    coder = load_tokenizer(tokenizer)
    corpora = [
        open_corpus(str(name), text_key=text_key, split_paragraphs=split_paragraphs)
        for name in inputs
    ]
    request = Request(
        corpora=tuple(CorpusRecord(name=c.name, fingerprint=c.fingerprint) for c in corpora),
        tokenizer=coder.fingerprint,
        holdout=holdout,
        text_key=text_key,
        split_paragraphs=split_paragraphs,
    )
    output = Path(output)
    if output.exists():
        return _existing(output, request)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    work.mkdir()
    try:
        manifest = _write_store(work, corpora, coder, request)
        try:
            work.rename(output)
        except OSError:
            if not output.exists():
                raise
            # Another process finished first; what it made is as good if it was asked for the same.
            return _existing(output, request)
        _sync_folder(output.parent)
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)


def builtin_store(cache_dir: str | Path | None = None, tokenizer: str = "bytes") -> Path:
    """Return the store of the built-in corpus, made on first use; safe to call from many processes.

    Args:
        cache_dir: where it is kept, by default `dmoe` in `$XDG_CACHE_HOME` or `~/.cache`.
        tokenizer: "bytes" or the path of a `tokenizer.json`.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmoe"
    corpus = open_corpus(BUILTIN_STDLIB, text_key="text", split_paragraphs=False)
    content = f"{corpus.fingerprint} {load_tokenizer(tokenizer).fingerprint} {_BUILTIN_HOLDOUT}"
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = Path(cache_dir) / f"stdlib-{platform.python_version()}-{name}"
    if not folder.exists():
        prepare([BUILTIN_STDLIB], folder, tokenizer=tokenizer, holdout=_BUILTIN_HOLDOUT)
    return folder


@dataclass
class _Tally:
    """What one pass over the corpora saw."""

    text_bytes: dict[SplitName, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    documents: dict[SplitName, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    skipped: int = 0
    lowest: int = _HASH_RANGE
    highest: int = 0


def _write_store(
    folder: Path, corpora: Sequence[Corpus], tokenizer: Tokenizer, request: Request
) -> Manifest:
    threshold = int(request.holdout * _HASH_RANGE)
    tally = _write_splits(folder, corpora, tokenizer, threshold)
    if not any(tally.documents.values()):
        names = ", ".join(corpus.name for corpus in corpora)
        raise ConfigError(f"no document with text in {names}")
    if request.holdout and not all(tally.documents.values()):
        # A corpus of few documents: move the threshold past the one that lies nearest to it.
        if tally.lowest == tally.highest:
            raise ConfigError(
                f"holdout is {request.holdout}, but all documents are the same one, so none can be "
                "held out: part the text with split_paragraphs, or set holdout to 0"
            )
        threshold = tally.highest if tally.documents["valid"] else tally.lowest + 1
        tally = _write_splits(folder, corpora, tokenizer, threshold)
    splits: dict[SplitName, SplitRecord] = {}
    for name, documents in tally.documents.items():
        if documents:
            splits[name] = _record(folder / name, documents, tally.text_bytes[name])
        else:
            bin_path(folder / name).unlink()
            idx_path(folder / name).unlink()
    record = TokenizerRecord(
        spec=tokenizer.spec,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
    )
    manifest = Manifest(
        fingerprint=store_fingerprint(record, splits),
        tokenizer=record,
        splits=splits,
        skipped_documents=tally.skipped,
        request=request,
    )
    with (folder / MANIFEST_NAME).open("w") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)
    return manifest


def _write_splits(
    folder: Path, corpora: Sequence[Corpus], tokenizer: Tokenizer, threshold: int
) -> _Tally:
    """Write both splits: a document whose hash is below the threshold is held out."""
    tally = _Tally()
    with ExitStack() as stack:
        writers: dict[SplitName, IndexedWriter] = {}
        for name in tally.documents:
            writer = IndexedWriter(
                folder / name, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id
            )
            writers[name] = stack.enter_context(writer)
        for texts in _batches(corpora, tally):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                content = text.encode()
                point = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
                tally.lowest = min(tally.lowest, point)
                tally.highest = max(tally.highest, point)
                split: SplitName = "valid" if point < threshold else "train"
                writers[split].add(ids)
                tally.text_bytes[split] += len(content)
                tally.documents[split] += 1
    return tally


def _batches(corpora: Sequence[Corpus], tally: _Tally) -> Iterator[list[str]]:
    """Yield documents in batches large enough to tokenize in parallel and small enough to hold."""
    batch: list[str] = []
    characters = 0
    for corpus in corpora:
        for text in corpus.documents():
            if not text.strip():
                tally.skipped += 1
                continue
            batch.append(text)
            characters += len(text)
            if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _record(prefix: Path, documents: int, text_bytes: int) -> SplitRecord:
    ids, starts = read_indexed(prefix)
    assert starts.size - 1 == documents
    return SplitRecord(
        documents=documents,
        tokens=ids.size,
        text_bytes=text_bytes,
        bin=hash_file(bin_path(prefix)),
        idx=hash_file(idx_path(prefix)),
    )


def _existing(output: Path, request: Request) -> Manifest:
    manifest = open_store(output).manifest if output.is_dir() else None
    if manifest is None or manifest.request != request:
        raise ConfigError(
            f"{output}: already there, and not made from the same inputs, tokenizer, holdout, "
            "text_key and split_paragraphs; choose another output, or delete it first"
        )
    return manifest


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
