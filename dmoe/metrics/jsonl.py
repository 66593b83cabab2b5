"""metrics.jsonl, the record of a run that programs read: one JSON object a line.

Written by rank 0. A resumed run first drops what lies beyond its checkpoint, so that its file
equals that of a run that was never interrupted.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmoe.config.base import ConfigError

Row = dict[str, Any]


class JsonlWriter:
    """Appends rows to a file, each one flushed; a line torn by a crash is removed on opening."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file = self._path.open("a", encoding="utf-8")
        self._cut(sum(len(line) for line in _whole_lines(self._path)))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        JSON has no NaN and no infinity: such a value becomes null, and its key is listed under
        `non_finite`.
        """
        bad = [
            key
            for key, value in row.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        clean = {**row, **dict.fromkeys(bad)} | ({"non_finite": bad} if bad else {})
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the first row with a later step, and all that follow it.

        Rows are in the order of their steps, so one cut of the file is enough; it leaves either the
        old file or the new one.
        """
        size = 0
        for line, row in _rows(self._path):
            if row["step"] > step:
                break
            size += len(line)
        self._cut(size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut(self, size: int) -> None:
        if size < self._path.stat().st_size:
            self._file.truncate(size)


def read_metrics(path: str | Path) -> list[Row]:
    """Return all rows of a metrics.jsonl; a last line that is still being written is left out.

    Raises:
        ConfigError: A line is not a JSON object.
    """
    return [row for _, row in _rows(Path(path))]


def _rows(path: Path) -> Iterator[tuple[bytes, Row]]:
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not a row of metrics: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: not a row of metrics: {row!r}")
        yield line, row


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))
