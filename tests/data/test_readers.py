import builtins
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dmoe.config.base import ConfigError
from dmoe.data.readers import read_json_lines, read_paragraphs, read_parquet, read_whole

TEXTS = ["first\nsecond line", "naïve 😀", "", "last"]
PLAIN = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()


def packed(kind: str) -> bytes:
    middle = PLAIN.index(b"\n") + 1
    if kind == "gz":
        return gzip.compress(PLAIN[:middle]) + gzip.compress(PLAIN[middle:])
    if kind == "zst":
        return zstandard.compress(PLAIN[:middle]) + zstandard.compress(PLAIN[middle:])
    return PLAIN


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst"])
def test_json_lines(tmp_path, kind):
    """Packed files made of two parts, as `cat a.gz b.gz` makes them, are read whole."""
    path = tmp_path / f"data.{kind}"
    path.write_bytes(packed(kind))
    assert list(read_json_lines(path, "text")) == TEXTS
    path.write_bytes(PLAIN.rstrip(b"\n"))
    assert list(read_json_lines(path.rename(tmp_path / "no_last_newline.jsonl"), "text")) == TEXTS


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_truncated_or_altered_archive(tmp_path, compress):
    data = compress(b"".join(b'{"text": "%d"}\n' % i for i in range(100_000)))
    path = tmp_path / f"data.{'gz' if compress is gzip.compress else 'zst'}"
    for damaged in (data[:-1], data[: len(data) // 2], b"not packed at all"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{path.name}: damaged at or before byte \d+"):
            list(read_json_lines(path, "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops}", r"line 2: not JSON"),
        (b'{"body": "x"}', r"line 2: no key 'text' \(found: body\); set text_key"),
        (b"[1]", r"line 2: no key 'text' \(found: list\)"),
        (b'{"text": null}', r"line 2: 'text' is NoneType, not text"),
        (b'{"text": "ab\\ud800"}', r"line 2: character 2 of 'text': surrogates not allowed"),
        (b'{"text": "\xff"}', r"byte 28: not UTF-8"),
    ],
)
def test_bad_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    if b"\xff" in line:
        assert path.read_bytes()[27:28] == b"\xff"
        message = r"byte 27: not UTF-8"
    with pytest.raises(ConfigError, match=r"bad\.jsonl: " + message):
        list(read_json_lines(path, "text"))


def test_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\ntwo\n \t\n\nthree")
    assert list(read_whole(path)) == ["\n\none\r\ntwo\n \t\n\nthree"]
    assert list(read_paragraphs(path)) == ["one\r\ntwo\n", "three"]
    path.write_bytes(b"line\nna\xefve\n")
    for read in (read_whole, read_paragraphs):
        with pytest.raises(ConfigError, match=r"a\.txt: byte 7: not UTF-8"):
            list(read(path))


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "id": [1, 2, 3, 4]}), path)
    assert list(read_parquet(path, "body")) == TEXTS
    with pytest.raises(ConfigError, match=r"a\.parquet: no column 'text' \(it has body, id\)"):
        list(read_parquet(path, "text"))
    with pytest.raises(ConfigError, match=r"a\.parquet: row 0: 'id' is int, not text"):
        list(read_parquet(path, "id"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a\.parquet: not readable Parquet"):
        list(read_parquet(path, "body"))


@pytest.mark.parametrize("package", ["pyarrow", "zstandard"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    path = tmp_path / "a.zst"
    path.touch()
    read = read_parquet if package == "pyarrow" else read_json_lines
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'dmoe\["):
        list(read(path, "text"))
