import gzip
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dmoe.config.base import ConfigError
from dmoe.data import preparation
from dmoe.data.corpora import Corpus
from dmoe.data.preparation import builtin_store, prepare
from dmoe.data.store import open_store, verify_store

TEXTS = [f"text {i}" for i in range(200)]


def documents(split):
    text = split.ids.tolist()
    return [bytes(text[a : b - 1]).decode() for a, b in pairwise(split.document_starts)]


def test_every_kind_of_file_makes_the_same_tokens(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    files = {
        "a.txt": "\n\n".join(TEXTS).encode(),
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    for name in (*files, "a.parquet"):
        out = tmp_path / f"out_{name}"
        prepare([tmp_path / name], out, split_paragraphs=True, holdout=0)
        read = documents(open_store(out).split("train"))
        # A paragraph of a .txt file keeps the newline that ends its last line.
        assert [text.rstrip("\n") for text in read] == TEXTS


def test_holdout_is_by_content(make_store):
    small = open_store(make_store(TEXTS[:100], "small", holdout=0.3))
    large = open_store(make_store(TEXTS + TEXTS[:50], "large", holdout=0.3))
    held = set(documents(small.split("valid")))
    assert 15 < len(held) < 45
    # More input moves no document, and a repeated one stays on its side.
    assert held == set(documents(large.split("valid"))) & set(TEXTS[:100])
    assert not set(documents(large.split("valid"))) & set(documents(large.split("train")))


@pytest.mark.parametrize("holdout", [1e-9, 1 - 1e-9])
def test_each_split_has_a_document(make_store, holdout):
    splits = open_store(make_store(TEXTS[:5], holdout=holdout)).splits
    assert sorted(split.num_documents for split in splits.values()) == [1, 4]


def test_no_holdout(make_store):
    store = make_store(TEXTS, holdout=0)
    assert sorted(path.name for path in store.iterdir()) == [
        "manifest.json",
        "train.bin",
        "train.idx",
    ]
    verify_store(store)


def test_nothing_to_hold_out(make_store, tmp_path):
    with pytest.raises(ConfigError, match=r"holdout is 0\.2, but all documents are the same one"):
        make_store(["same", "same"])
    with pytest.raises(ConfigError, match=r"no document with text in .*store\.jsonl"):
        make_store(["", " \n"])
    with pytest.raises(ConfigError, match=r"holdout is 1, but must be"):
        make_store(TEXTS, holdout=1)
    with pytest.raises(ConfigError, match="no input given"):
        prepare([], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store.jsonl"]


def test_empty_documents_are_counted(make_store):
    manifest = open_store(make_store(["a", "", "b", " \n\t", "c"], holdout=0)).manifest
    assert manifest.skipped_documents == 2
    assert manifest.splits["train"].documents == 3
    assert manifest.splits["train"].text_bytes == 3
    assert manifest.total_tokens == 6


def test_same_request_is_reused_and_another_refused(make_store, tmp_path):
    store = make_store(TEXTS)
    before = (store / "manifest.json").stat().st_mtime_ns
    make_store(TEXTS)
    assert (store / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"already there, .* choose another output, or delete"):
        make_store(TEXTS, holdout=0.5)
    with pytest.raises(ConfigError, match="already there"):
        make_store([*TEXTS, "one more"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="already there"):
        prepare([tmp_path / "store.jsonl"], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_batches_do_not_change_the_result(make_store, monkeypatch):
    first = open_store(make_store(TEXTS, "first")).fingerprint
    monkeypatch.setattr(preparation, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 20)
    assert open_store(make_store(TEXTS, "second")).fingerprint == first


def test_failure_leaves_nothing(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{"oops": 1}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 2"):
        prepare([source], tmp_path / "store")
    assert list(tmp_path.iterdir()) == [source]


def test_store_is_as_readable_as_the_umask_allows(make_store):
    mask = os.umask(0)
    os.umask(mask)
    assert make_store(TEXTS).stat().st_mode & 0o777 == 0o777 & ~mask


STOPS_AT = """
import sys, time
from dmoe.data import preparation

def stop(*args):
    print("reached", flush=True)
    time.sleep(100)

source, output, function = sys.argv[1:]
setattr(preparation, function, stop)
preparation.prepare([source], output)
"""


@pytest.mark.parametrize("function", ["hash_file", "_sync_folder"])
def test_killed_prepare_leaves_no_store(tmp_path, function):
    """Killed with all tokens written, and with only the rename left to do."""
    source, output = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = [sys.executable, "-c", STOPS_AT, source, output, function]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"reached\n"
        process.kill()
    assert not output.exists()
    prepare([source], output)
    verify_store(output)


@pytest.fixture
def small_stdlib(monkeypatch):
    """Return a function that puts a short corpus in its place; its readers begin together."""

    def install(readers):
        barrier = threading.Barrier(readers)

        def documents():
            barrier.wait(timeout=30)
            return iter(TEXTS)

        corpus = Corpus("builtin:stdlib", "fingerprint", documents)
        monkeypatch.setattr(preparation, "open_corpus", lambda name, **options: corpus)

    return install


def test_builtin_store_under_concurrency(tmp_path, small_stdlib):
    """Eight find the folder missing and write it; all end with the same whole one."""
    small_stdlib(readers=8)
    with ThreadPoolExecutor(8) as pool:
        (folder,) = set(pool.map(builtin_store, [tmp_path] * 8))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    verify_store(folder)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert builtin_store(tmp_path) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_builtin_store_location(tmp_path, monkeypatch, small_stdlib):
    small_stdlib(readers=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    version = ".".join(map(str, sys.version_info[:3]))
    folder = builtin_store()
    assert folder.parent == tmp_path / "cache" / "dmoe"
    assert folder.name.startswith(f"stdlib-{version}-")
