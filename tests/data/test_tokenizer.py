import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.base import ConfigError
from dmoe.data.tokenizer import ByteTokenizer, HFTokenizer, load_tokenizer

TEXT = "def add(a, b):\n    return a + b  # naïve 😀\n"


@pytest.fixture
def bpe_path(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    # What a model's own tokenizer.json may ask for, and no corpus may suffer.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eod_id, 300]) == text


def test_bytes_decode_replaces_broken_utf8():
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a�b"


def test_tokenizer_json_round_trip(bpe_path):
    tokenizer = load_tokenizer(str(bpe_path))
    ids = tokenizer.encode(TEXT)
    assert 4 < len(ids) < len(TEXT.encode())
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == TEXT
    assert tokenizer.vocab_size == len(json.loads(bpe_path.read_text())["model"]["vocab"])
    batch = tokenizer.encode_batch([TEXT, "", "a"])
    assert [b.tolist() for b in batch] == [tokenizer.encode(t).tolist() for t in (TEXT, "", "a")]


def test_text_cannot_forge_an_end_of_document(bpe_path):
    tokenizer = HFTokenizer(bpe_path)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_fingerprints_differ(bpe_path):
    first = HFTokenizer(bpe_path).fingerprint
    assert first == load_tokenizer(str(bpe_path.parent)).fingerprint
    bpe_path.write_text(bpe_path.read_text() + "\n")
    assert len({first, HFTokenizer(bpe_path).fingerprint, ByteTokenizer().fingerprint}) == 3


def test_errors_name_the_file(bpe_path, tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.json: No such file"):
        load_tokenizer(str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match=r"no end-of-document token; looked for <nothing>"):
        HFTokenizer(bpe_path, eod="<nothing>")
    bpe_path.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer\.json"):
        HFTokenizer(bpe_path)
