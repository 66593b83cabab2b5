"""Small stores and splits for the data tests."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmoe.data.preparation import prepare
from dmoe.data.store import TokenSplit


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that prepares a byte store from texts."""

    def make(texts: list[str], name: str = "store", **options) -> Path:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([source], tmp_path / name, **{"holdout": 0.2, **options})
        return tmp_path / name

    return make


@pytest.fixture
def make_split() -> Callable[..., TokenSplit]:
    """Return a function that holds documents as a split in memory."""

    def make(documents: list[list[int]], name: str = "memory") -> TokenSplit:
        lengths = [len(document) for document in documents]
        return TokenSplit(
            source=name,
            fingerprint=f"fingerprint of {name}",
            path=Path(f"{name}.bin"),
            ids=np.array([token for document in documents for token in document], np.uint16),
            document_starts=np.cumsum([0, *lengths]),
            text_bytes=None,
        )

    return make


@pytest.fixture
def numbered_split(make_split) -> TokenSplit:
    """Forty documents of 0 to 17 tokens; token p of the file is p, so all are distinct."""
    lengths = np.random.default_rng(0).integers(0, 18, size=40)
    ends = np.cumsum(lengths)
    return make_split([list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)])
