"""Writing a small file so that a reader sees the old text or the new one, never a part."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content by UTF-8 text: write beside it, flush to disk, rename over it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
