"""A run on the console: a live progress line on a terminal, `key=value` lines elsewhere.

Written by rank 0 on standard output. The plain lines are stable, for grep and for logs.
"""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_FORMATS = {
    "step": "d",
    "tokens": "d",
    "loss": ".4f",
    "lr": ".1e",
    "grad_norm": ".2f",
    "tokens_per_second": ".0f",
    "eval_loss": ".4f",
    "eval_bits_per_byte": ".4f",
}
"""The keys of metrics.jsonl that are shown, in their order."""


class Console:
    """Shows rows of metrics and messages.

    Args:
        total_steps: Steps of the whole run, for the bar and the remaining time.
        enabled: False on every rank but one; nothing is then printed.
        file: Where to print; None is standard output.
    """

    def __init__(self, total_steps: int, enabled: bool = True, file: TextIO | None = None) -> None:
        self._enabled = enabled
        self._rich = RichConsole(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        if enabled and self._rich.is_terminal:
            self._progress = Progress(
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._rich,
                auto_refresh=False,  # a second thread would only compete with the training
            )
            self._task = self._progress.add_task("", total=total_steps)
            self._progress.start()

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.jsonl; an evaluation's stays, a step's gives way to the next."""
        if self._progress is None or "eval_loss" in row:
            self.message(plain_line(row))
        else:
            # Short enough for 80 columns; the step is in the first column.
            brief = plain_line({key: row[key] for key in row if key not in ("step", "tokens")})
            brief = brief.replace("tokens_per_second", "tok/s")
            self._progress.update(self._task, completed=row["step"], description=brief)
            self._progress.refresh()

    def message(self, text: str) -> None:
        """Print a text above the progress line, whatever characters are in it."""
        if self._enabled:
            self._rich.print(Text(printable(text, self._rich.encoding)))

    def close(self) -> None:
        """Leave the last progress line standing."""
        if self._progress is not None:
            self._progress.stop()


def plain_line(row: Mapping[str, Any]) -> str:
    """Return a row as `step=100 loss=2.1034 lr=3.0e-04 ...`, with `k` last for an evaluation."""
    parts = [
        f"{key}={row[key]:{spec}}" for key, spec in _FORMATS.items() if row.get(key) is not None
    ]
    if row.get("k") is not None:
        parts.append("k=" + str(row["k"]).replace(" ", ""))
    return " ".join(parts)


def printable(text: str, encoding: str = "utf-8") -> str:
    """Escape what could drive a terminal or cannot be encoded; line breaks and tabs stay."""
    escaped = (
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )
    return "".join(escaped).encode(encoding, "backslashreplace").decode(encoding)
