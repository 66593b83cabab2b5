"""From a `data` section to datasets."""

import numpy as np
import pytest
from pydantic import ValidationError

from dmoe.config.base import ConfigError
from dmoe.data.blend import Blend
from dmoe.data.build import build_train_dataset, build_valid_split
from dmoe.data.config import DataConfig
from dmoe.data.indexed import IndexedWriter
from dmoe.data.packing import PackedDataset

TEXTS = [f"document number {i}" for i in range(50)]
TRAIN = {"seq_len": 16, "vocab_size": 257, "seed": 1}


def config_of(*paths, **keys):
    return DataConfig(sources=[{"path": str(path)} for path in paths], **keys)


def flip(path, offset=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def foreign(tmp_path):
    with IndexedWriter(tmp_path / "foreign", vocab_size=257, eod_id=256) as writer:
        writer.add(np.arange(200))
    return tmp_path / "foreign"


def test_defaults():
    config = DataConfig()
    assert [source.path for source in config.sources] == ["builtin:stdlib"]
    with pytest.raises(ValidationError):
        DataConfig(sources=[])
    with pytest.raises(ValidationError):
        config_of("a", sources_typo=1)
    with pytest.raises(ValidationError):
        DataConfig(sources=[{"path": "a", "weight": 0}])


def test_one_source_is_its_own_blend(make_store):
    store = make_store(TEXTS)
    dataset = build_train_dataset(config_of(store), **TRAIN)
    assert isinstance(dataset, PackedDataset)
    assert dataset.sources[0].path == str(store)
    assert build_valid_split(config_of(store), vocab_size=257).path == store / "valid.bin"


def test_several_sources(make_store, foreign):
    store = make_store(TEXTS)
    config = config_of(store, foreign)
    blend = build_train_dataset(config, **TRAIN)
    assert isinstance(blend, Blend)
    assert [source.path for source in blend.sources] == [str(store), str(foreign)]
    with pytest.raises(ConfigError, match=r"data\.sources has 2 entries: set data\.valid"):
        build_valid_split(config, vocab_size=257)
    config = config_of(store, foreign, valid=str(foreign))
    assert build_valid_split(config, vocab_size=257).num_tokens == 201


def test_valid_needs_a_held_out_split(make_store, foreign):
    for path in (foreign, make_store(TEXTS, holdout=0)):
        with pytest.raises(ConfigError, match=r"has no 'valid' split"):
            build_valid_split(config_of(path), vocab_size=257)


def test_verification(make_store):
    store = make_store(TEXTS)
    flip(store / "train.bin")
    build_train_dataset(config_of(store, verify="size"), **TRAIN)
    with pytest.raises(ConfigError, match=r"train\.bin: altered between byte 0 and byte"):
        build_train_dataset(config_of(store), **TRAIN)
    build_valid_split(config_of(store), vocab_size=257)
    flip(store / "valid.bin")
    with pytest.raises(ConfigError, match=r"valid\.bin: altered"):
        build_valid_split(config_of(store), vocab_size=257)


def test_tokenizer_must_match(make_store, tmp_path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    words = {"<eos>": 0, "document": 1}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>")).save(str(path))
    store = make_store(TEXTS)
    config = config_of(store, tokenizer=str(path))
    with pytest.raises(
        ConfigError, match=r"made with tokenizer bytes .* data\.tokenizer is .*json"
    ):
        build_train_dataset(config, **TRAIN)
    with pytest.raises(ConfigError, match=r"model\.vocab_size 256 is less than the 257 ids"):
        build_train_dataset(config_of(store), **{**TRAIN, "vocab_size": 256})
