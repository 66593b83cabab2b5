"""Opening and verifying stores: every kind of damage is found, and named."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest

from dmoe.config.base import ConfigError
from dmoe.data import manifest as manifest_module
from dmoe.data import store as store_module
from dmoe.data.indexed import IndexedWriter
from dmoe.data.store import open_store, verify_store

TEXTS = [f"document number {i} {'x' * (i % 7)}" for i in range(50)]
FILES = ["train.bin", "train.idx", "valid.bin", "valid.idx"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 bytes, so that a test store has many."""
    monkeypatch.setattr(manifest_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 64)


@pytest.fixture
def store(small_chunks, make_store):
    return make_store(TEXTS)


def test_round_trip(store):
    opened = open_store(store)
    texts = []
    for split in opened.splits.values():
        ids, starts = split.ids, split.document_starts
        documents = [ids[a:b] for a, b in pairwise(starts)]
        assert all(document[-1] == 256 for document in documents)
        texts += [document[:-1].astype(np.uint8).tobytes().decode() for document in documents]
        assert split.text_bytes == split.num_tokens - split.num_documents
        assert split.bits_per_byte(np.log(2)) == pytest.approx(split.num_tokens / split.text_bytes)
    assert sorted(texts) == sorted(TEXTS)
    assert opened.fingerprint == opened.manifest.fingerprint


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_verification(store, world):
    total = verify_store(store)
    assert total > 10
    counts = [verify_store(store, rank=rank, world=world) for rank in range(world)]
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_located(store, name):
    path = store / name
    data = bytearray(path.read_bytes())
    data[70] ^= 1
    path.write_bytes(data)
    end = min(128, len(data))
    with pytest.raises(ConfigError, match=rf"{name}: altered between byte 64 and byte {end}"):
        verify_store(store)


def test_only_the_rank_with_the_damage_raises(store):
    path = store / "train.bin"
    data = bytearray(path.read_bytes())
    data[70] ^= 1  # chunk 1
    path.write_bytes(data)
    verify_store(store, rank=0, world=2)
    with pytest.raises(ConfigError, match=r"train\.bin"):
        verify_store(store, rank=1, world=2)
    verify_store(store, splits=["valid"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("check", [open_store, verify_store])
def test_truncated_or_missing_file(store, name, check):
    path = store / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"{name}: ends at byte {size - 1}, .* {size} bytes"):
        check(store)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"{name}: missing"):
        check(store)


@pytest.mark.parametrize("check", [open_store, verify_store])
def test_swapped_indexes(store, check):
    (store / "train.idx").rename(store / "swap")
    (store / "valid.idx").rename(store / "train.idx")
    (store / "swap").rename(store / "valid.idx")
    with pytest.raises(ConfigError, match=r"train\.idx: ends at byte"):
        check(store)


def test_extra_file(store):
    (store / "train.idx.old").touch()
    with pytest.raises(ConfigError, match=r"train\.idx\.old: is not in the manifest"):
        verify_store(store)


def test_link_out_of_the_store(store, tmp_path):
    outside = tmp_path / "outside.bin"
    (store / "train.bin").rename(outside)
    (store / "train.bin").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"train\.bin: a link that leaves the store folder"):
        open_store(store)


def test_edited_manifest(store):
    path = store / "manifest.json"
    good = json.loads(path.read_text())
    edited = json.loads(path.read_text())
    edited["splits"]["valid"]["text_bytes"] += 1
    path.write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"manifest\.json: .* it was altered"):
        open_store(store)
    path.write_text(json.dumps(good | {"format": 2}))
    with pytest.raises(ConfigError, match=r"manifest\.json: at format: Input should be 1"):
        open_store(store)
    edited = good | {"splits": {"../../etc/passwd": good["splits"]["train"]}}
    path.write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"manifest\.json: at splits"):
        open_store(store)
    path.write_text(json.dumps(good)[:100])
    with pytest.raises(ConfigError, match=r"manifest\.json: at the top level: Invalid JSON"):
        open_store(store)
    path.unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json: No such file"):
        open_store(store)


def test_fingerprint_names_the_data_not_the_place(store, make_store, tmp_path):
    shutil.copytree(store, tmp_path / "moved")
    assert open_store(tmp_path / "moved").fingerprint == open_store(store).fingerprint
    other = make_store([*TEXTS[:-1], "document number 4O"], "other")
    assert open_store(other).fingerprint != open_store(store).fingerprint


def test_foreign_prefix(tmp_path):
    with IndexedWriter(tmp_path / "foreign_text", vocab_size=257, eod_id=256) as writer:
        writer.add(np.array([1, 2, 3]))
    store = open_store(tmp_path / "foreign_text")
    assert store.manifest is None
    assert store.fingerprint.startswith("unverified-")
    assert store.split("train").ids.tolist() == [1, 2, 3, 256]
    assert store.split("train").bits_per_byte(1.0) is None
    with pytest.raises(ConfigError, match=r"foreign_text has no 'valid' split \(it has train\)"):
        store.split("valid")


def test_neither_folder_nor_prefix(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing: neither a store folder .*`dmoe data prepare`"):
        open_store(tmp_path / "nothing")
