"""A small token store and configuration that trains in a second."""

from pathlib import Path

import pytest

from dmoe.data import prepare


@pytest.fixture(scope="session")
def token_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 40 kB of bytes with structure, in documents of different lengths."""
    folder = tmp_path_factory.mktemp("text")
    text = "\n\n".join(
        f"document {i}: " + "the quick brown fox jumps over the lazy dog; " * (1 + i % 7)
        for i in range(200)
    )
    (folder / "text.txt").write_text(text)
    prepare([folder / "text.txt"], folder / "store", holdout=0.1, split_paragraphs=True)
    return folder / "store"
