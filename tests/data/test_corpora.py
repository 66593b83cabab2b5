import sys
import types

import pytest

from dmoe.config.base import ConfigError
from dmoe.data.corpora import open_corpus, stdlib_files


def open_text(name, **options):
    return open_corpus(str(name), **{"text_key": "text", "split_paragraphs": False, **options})


def test_folder_is_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "ignored.md").write_text("no")
    corpus = open_text(tmp_path)
    assert list(corpus.documents()) == ["one", "two", "three"]
    assert list(corpus.documents()) == ["one", "two", "three"]


def test_paragraphs_on_request(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert list(open_text(tmp_path).documents()) == ["one\n\ntwo"]
    assert list(open_text(tmp_path, split_paragraphs=True).documents()) == ["one\n", "two"]


def test_fingerprint_follows_content_and_names(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_text(tmp_path).fingerprint
    assert first == open_text(tmp_path).fingerprint
    path.rename(tmp_path / "b.txt")
    second = open_text(tmp_path).fingerprint
    (tmp_path / "b.txt").write_text("two")
    assert len({first, second, open_text(tmp_path).fingerprint}) == 3


def test_unusable_names(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.txt: no such file or folder"):
        open_text(tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match=r"no file in this folder is one of the readable kinds"):
        open_text(tmp_path)
    (tmp_path / "a.doc").touch()
    with pytest.raises(ConfigError, match=r"a\.doc: not one of the readable kinds \(\.txt, "):
        open_text(tmp_path / "a.doc")


def test_standard_library():
    files = stdlib_files()
    assert any(path.name == "argparse.py" for path in files)
    assert not any({"site-packages", "test"}.intersection(path.parts) for path in files)
    total = sum(path.stat().st_size for path in files)
    assert 5_000_000 < total < 20_000_000
    corpus = open_text("builtin:stdlib")
    assert next(corpus.documents()) == files[0].read_bytes().decode()


class FakeDataset(list):
    _fingerprint = "abc123"


@pytest.fixture
def fake_datasets(monkeypatch):
    module = types.ModuleType("datasets")
    module.calls = []

    def load_dataset(path, config, split):
        module.calls.append((path, config, split))
        if path == "missing":
            raise ValueError("no such dataset")
        return FakeDataset([{"text": "one"}, {"text": "two"}])

    module.load_dataset = load_dataset
    module.load_from_disk = lambda path: FakeDataset([{"body": path}])
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hugging_face_hub(fake_datasets):
    corpus = open_text("hf:owner/name,config:train[:1%]")
    assert fake_datasets.calls == [("owner/name", "config", "train[:1%]")]
    assert list(corpus.documents()) == ["one", "two"]
    assert corpus.fingerprint == "abc123"
    open_text("hf:plain")
    assert fake_datasets.calls[-1] == ("plain", None, "train")
    with pytest.raises(ConfigError, match=r"hf:missing: no such dataset"):
        open_text("hf:missing")


def test_hugging_face_on_disk(fake_datasets, tmp_path):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).touch()
    assert list(open_text(tmp_path, text_key="body").documents()) == [str(tmp_path)]
    with pytest.raises(ConfigError, match=r"row 0: no key 'text' \(found: body\)"):
        list(open_text(tmp_path).documents())


def test_hugging_face_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 'dmoe\[data\]"):
        open_text("hf:anything")
