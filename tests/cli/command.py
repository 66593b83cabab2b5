"""Runs a command in this process, and the run that the tests of commands look at."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from dmoe.cli import main

STEPS = 4


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Return the result; anything else on standard output would not parse."""
        assert self.status == 0, self.err
        return json.loads(self.out)


def dmoe(*arguments: object, stdin: str = "") -> Outcome:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", io.StringIO(stdin)):
        status = main([str(argument) for argument in arguments])
    return Outcome(status, out.getvalue(), err.getvalue())


def prepare_store(folder: Path, *options: object) -> Outcome:
    """Make a token store of the text in a folder."""
    arguments = (folder / "text.txt", "-o", folder / "store", "--split-paragraphs", *options)
    return dmoe("data", "prepare", *arguments)
