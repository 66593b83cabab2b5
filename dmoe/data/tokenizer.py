"""Tokenizers: raw bytes, or any Hugging Face `tokenizer.json`.

Used by `preparation`, evaluation and generation.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from dmoe.config.base import ConfigError

_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    spec: str
    """What `load_tokenizer` was given."""
    vocab_size: int
    """Largest id plus one."""
    eod_id: int
    """The id that ends every document; no text encodes to it."""
    fingerprint: str
    """SHA-256 of everything that decides the ids."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text as int64, without an end-of-document mark."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode many texts, in parallel where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; end-of-document marks become nothing."""
        ...


class ByteTokenizer:
    """The 256 byte values of UTF-8, and 256 for the end of a document."""

    spec = "bytes"
    vocab_size = 257
    eod_id = 256
    fingerprint = hashlib.sha256(b"dmoe byte tokenizer, eod 256").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of the text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; broken UTF-8 becomes U+FFFD, ids that are no byte become nothing."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, run by the `tokenizers` library.

    Args:
        path: the `tokenizer.json`.
        eod: the token that ends a document; by default the first of the usual names that exists.

    Raises:
        ConfigError: if the file cannot be read or has no end-of-document token.
    """

    def __init__(self, path: str | Path, eod: str | None = None):
        try:
            content = Path(path).read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except OSError as error:
            raise ConfigError(f"tokenizer {path}: {error.strerror}") from None
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ConfigError(f"tokenizer {path}: not a tokenizer.json: {error}") from None
        # What a tokenizer.json asks for on behalf of one model would silently cut or pad documents,
        # and a document that spells a special token must not end itself.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        names = (eod,) if eod else _EOD_NAMES
        found = [name for name in names if name in vocab]
        if not found:
            raise ConfigError(
                f"tokenizer {path}: no end-of-document token; looked for {', '.join(names)}"
            )
        self.spec = str(path)
        self.vocab_size = max(vocab.values()) + 1
        self.eod_id: int = vocab[found[0]]
        self.fingerprint = hashlib.sha256(content + f"\neod {self.eod_id}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the text alone: no BOS, EOS or template is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode many texts on the library's own threads."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; special tokens become nothing."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer of `data.tokenizer`: "bytes", or the path of a `tokenizer.json`."""
    if spec == ByteTokenizer.spec:
        return ByteTokenizer()
    path = Path(spec)
    return HFTokenizer(path / "tokenizer.json" if path.is_dir() else path)
