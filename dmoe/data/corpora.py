"""Finds what the user named: files, folders, Hugging Face datasets, or the built-in corpus.

`open_corpus` returns a `Corpus`, which `preparation` reads.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dmoe.config.base import ConfigError
from dmoe.data.readers import (
    missing_extra,
    read_json_lines,
    read_paragraphs,
    read_parquet,
    read_whole,
    text_of,
)

BUILTIN_STDLIB = "builtin:stdlib"
_HUGGING_FACE = "hf:"
# Installed packages are not the standard library, tests would be more than half of it, and
# _sysconfigdata holds the build paths of one machine.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_STDLIB_SKIPPED_PREFIX = "_sysconfigdata"


@dataclass(frozen=True)
class Corpus:
    """A named source of documents that can be read more than once."""

    name: str
    """What the user called it."""
    fingerprint: str
    """SHA-256 of the content, or the fingerprint its library gives it."""
    documents: Callable[[], Iterator[str]]
    """Starts reading from the beginning."""


def open_corpus(name: str, *, text_key: str, split_paragraphs: bool) -> Corpus:
    """Return the corpus that a name stands for.

    Args:
        name: `builtin:stdlib`, `hf:DATASET[,CONFIG][:SPLIT]`, the folder of a saved Hugging Face
            dataset, a file (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), or a folder of such.
        text_key: JSON key or column that holds the text.
        split_paragraphs: blank lines part the documents of a .txt file; otherwise it is one.

    Raises:
        ConfigError: if there is no such corpus.
    """
    if name == BUILTIN_STDLIB:
        return _stdlib_corpus()
    if name.startswith(_HUGGING_FACE):
        return _hub_corpus(name, text_key)
    path = Path(name)
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        return _dataset_corpus(name, _datasets().load_from_disk(name), text_key)
    return _file_corpus(path, text_key, split_paragraphs)


def stdlib_files() -> list[Path]:
    """Return the UTF-8 source files of the running Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Pruned, not filtered: site-packages may hold a hundred times more files than the library.
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        files += [
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not name.startswith(_STDLIB_SKIPPED_PREFIX)
        ]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    return [path for path in files if _is_utf8(path)]


def _stdlib_corpus() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files()
    if not files:
        raise ConfigError(f"{BUILTIN_STDLIB}: this Python has no source files under {root}")

    def documents() -> Iterator[str]:
        for path in files:
            yield from read_whole(path)

    return Corpus(BUILTIN_STDLIB, _hash_files(files, root), documents)


def _file_corpus(path: Path, text_key: str, split_paragraphs: bool) -> Corpus:
    json_lines = partial(read_json_lines, key=text_key)
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": read_paragraphs if split_paragraphs else read_whole,
        ".jsonl": json_lines,
        ".jsonl.gz": json_lines,
        ".jsonl.zst": json_lines,
        ".parquet": partial(read_parquet, key=text_key),
    }
    kinds = ", ".join(readers)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in candidates if file.is_file() and file.name.endswith(tuple(readers))]
    if not files:
        where = "no file in this folder is" if path.is_dir() else "not"
        raise ConfigError(f"{path}: {where} one of the readable kinds ({kinds})")

    def documents() -> Iterator[str]:
        for file in files:
            yield from next(read for end, read in readers.items() if file.name.endswith(end))(file)

    return Corpus(str(path), _hash_files(files, path), documents)


def _hub_corpus(name: str, text_key: str) -> Corpus:
    # A split may itself hold a colon ("train[:1%]"): only the first one parts it from the dataset.
    dataset_name, _, split = name.removeprefix(_HUGGING_FACE).partition(":")
    path, _, config = dataset_name.partition(",")
    datasets = _datasets()
    try:
        dataset = datasets.load_dataset(path, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None
    return _dataset_corpus(name, dataset, text_key)


def _dataset_corpus(name: str, dataset: Any, text_key: str) -> Corpus:
    def documents() -> Iterator[str]:
        for row, record in enumerate(dataset):
            yield text_of(record, text_key, f"{name}: row {row}")

    return Corpus(name, dataset._fingerprint, documents)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "a Hugging Face dataset") from None
    return datasets


def _hash_files(files: list[Path], root: Path) -> str:
    """Return one SHA-256 over the contents of files and their names below `root`."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True
