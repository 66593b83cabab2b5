"""Readers of document files: each yields one `str` a document.

What they cannot read they name by file and place. Called by `corpora`.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dmoe.config.base import ConfigError


def read_whole(path: Path) -> Iterator[str]:
    """Yield the file as one document."""
    yield _decode(path.read_bytes(), path, 0)


def read_paragraphs(path: Path) -> Iterator[str]:
    """Yield each run of lines between blank lines."""
    lines: list[str] = []
    with path.open("rb") as file:
        for line, start in _lines(file):
            text = _decode(line, path, start)
            if text.strip():
                lines.append(text)
            elif lines:
                yield "".join(lines)
                lines = []
    if lines:
        yield "".join(lines)


def read_json_lines(path: Path, key: str) -> Iterator[str]:
    """Yield `key` of the JSON object on each line; errors count bytes of the unpacked text."""
    with path.open("rb") as packed:
        for number, (line, start) in enumerate(_lines(_unpack(packed, path)), start=1):
            text = _decode(line, path, start)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number}: not JSON: {error}") from None
            yield text_of(row, key, f"{path}: line {number}")


def read_parquet(path: Path, key: str) -> Iterator[str]:
    """Yield the column `key`, one batch of rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise missing_extra("pyarrow", path) from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if key not in names:
            raise ConfigError(
                f"{path}: no column {key!r} (it has {', '.join(names)}); set text_key"
            )
        row = 0
        for batch in file.iter_batches(columns=[key]):
            for value in batch.column(0).to_pylist():
                yield text_of({key: value}, key, f"{path}: row {row}")
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable Parquet: {error}") from None


def text_of(row: Any, key: str, where: str) -> str:
    """Return the text of a record.

    Raises:
        ConfigError: at `where`, if there is no such key or its value is not text.
    """
    if not isinstance(row, dict) or key not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f"{where}: no key {key!r} (found: {found}); set text_key")
    text = row[key]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {key!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half a surrogate pair
        raise ConfigError(f"{where}: character {error.start} of {key!r}: {error.reason}") from None
    return text


def missing_extra(package: str, what: object) -> ConfigError:
    """Return the error for an optional package that is not installed."""
    return ConfigError(f"{what}: needs the package {package}: pip install 'dmoe[data]'")


def _unpack(packed: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain, .gz or .zst file."""
    if path.suffix == ".gz":
        file: Any = gzip.GzipFile(fileobj=packed)
        broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    elif path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise missing_extra("zstandard", path) from None
        file, broken = _zstd_lines(packed, zstandard), (EOFError, zstandard.ZstdError)
    else:
        file, broken = packed, ()
    try:
        yield from file
    except broken as error:
        at = packed.tell()
        raise ConfigError(f"{path}: damaged at or before byte {at} of the file: {error}") from None


def _zstd_lines(packed: BinaryIO, zstandard: Any) -> Iterator[bytes]:
    """Yield lines; the package's own file object reads a truncated file without a complaint."""
    decoder, rest = None, b""
    while block := packed.read(1 << 16):
        while block:
            decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + decoder.decompress(block)).split(b"\n")
            yield from (line + b"\n" for line in lines)
            # Files joined with `cat` have several frames.
            block = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise EOFError("the file ends inside a frame")
    if rest:
        yield rest


def _lines(lines: Iterator[bytes] | BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield each line with the byte offset at which it starts."""
    start = 0
    for line in lines:
        yield line, start
        start += len(line)


def _decode(content: bytes, path: Path, start: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise ConfigError(f"{path}: byte {at}: not UTF-8 ({error.reason})") from None
