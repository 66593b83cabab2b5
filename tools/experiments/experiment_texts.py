"""Names the texts of an experiment on its page: files with size and SHA-256, not where they lie.

Called by the experiments on several texts beside this file.
"""

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

from experiment_page import table

from dmoe.config.base import ConfigError
from dmoe.data.corpora import BUILTIN_STDLIB, open_corpus, stdlib_files


def texts_table(texts: Mapping[str, str], max_bytes: int | None = None) -> str:
    """Return a table in Markdown of the files of texts, which are given as to `open_corpus`.

    Args:
        texts: what each is called on the page, and its place.
        max_bytes: those of a text that are used; files behind them are left out.
    """
    rows = [[name, *cells] for name, path in texts.items() for cells in _files(path, max_bytes)]
    return table(["text", "file", "bytes", "SHA-256"], rows)


def _files(path: str, max_bytes: int | None) -> list[list[str]]:
    """Return name, size and hash of each file; the standard library counts as one."""
    if path == BUILTIN_STDLIB:
        files = stdlib_files()
        size = sum(file.stat().st_size for file in files)
        corpus = open_corpus(path, text_key="text", split_paragraphs=False)
        name = f"`{path}`: {len(files)} files of Python {platform.python_version()}"
        return [[name, f"{size:,}", f"`{corpus.fingerprint}`, of names and contents"]]
    rows, size = [], 0
    for file in filter(_is_read, sorted(Path(path).rglob("*")) or [Path(path)]):
        if max_bytes is None or size < max_bytes:
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            name = (Path(path).name / file.relative_to(path)).as_posix()
            rows.append([f"`{name}`", f"{len(content):,}", f"`{digest}`"])
            size += len(content)
    return rows


def _is_read(file: Path) -> bool:
    """Tell whether a file of a folder is of a kind that `open_corpus` reads."""
    try:
        open_corpus(str(file), text_key="text", split_paragraphs=False)
    except ConfigError:
        return False
    return file.is_file()
