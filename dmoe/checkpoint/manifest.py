"""The manifest of a checkpoint: size and SHA-256 of each file, protected by a digest of itself.

commit writes it last; manager loads no folder that does not agree with it.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint.ranks import ALONE, CheckpointError, Ranks

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_SIZE_LIMIT = 64 << 20


class CorruptCheckpointError(CheckpointError):
    """A folder that is not, or no longer, what was saved there."""


@dataclass(frozen=True)
class Problem:
    """One way in which a folder differs from what was saved."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file} {self.message}"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The list of the files that make up one checkpoint."""

    step: int
    files: dict[str, FileRecord]

    def encode(self) -> bytes:
        """Return the JSON text, which carries a digest of itself."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**content, "sha256": _digest(content)}, indent=1).encode()


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step_{step:08d}"


def verify(folder: Path, ranks: Ranks = ALONE) -> None:
    """Check every byte of a checkpoint against its manifest, each rank a share of the files.

    Raises:
        CorruptCheckpointError: on every rank, naming the bad files.
    """
    problems = find_problems(folder, ranks)
    if problems:
        raise CorruptCheckpointError(f"{folder} is damaged: {'; '.join(map(str, problems))}")


def find_problems(folder: Path, ranks: Ranks = ALONE) -> list[Problem]:
    """Return every way in which a folder differs from its manifest, the same list on all ranks."""
    found, expected = ranks.share(f"reading {folder}", lambda: _survey(folder))
    actual = hash_files(folder, expected, ranks)
    problems = [Problem(*entry) for entry in found]
    problems += [
        Problem(name, "does not have the content that was saved (SHA-256 differs)")
        for name, sha256 in expected.items()
        if actual[name].sha256 != sha256
    ]
    return problems


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder and check it against its own digest.

    Raises:
        CorruptCheckpointError: it is missing, altered, or not of the step in the folder's name.
    """
    path = folder / MANIFEST
    if path.is_symlink():
        raise CorruptCheckpointError(f"{path} is a link, not a plain file")
    try:
        with path.open("rb") as stream:
            text = stream.read(_SIZE_LIMIT)
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        content: dict[str, Any] = json.loads(text)
        version, sha256 = content["format_version"], content.pop("sha256")
        intact = sha256 == _digest(content)
        manifest = Manifest(
            content["step"],
            {name: FileRecord(**record) for name, record in content["files"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not a manifest: {error!r}") from error
    if not intact:
        raise CorruptCheckpointError(f"{path} is altered: it does not match its own digest")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}; this dmoe reads {FORMAT_VERSION}")
    if folder.name.startswith("step_") and folder.name != step_name(manifest.step):
        raise CorruptCheckpointError(f"{path} is of step {manifest.step}, not of {folder.name}")
    return manifest


def hash_files(folder: Path, names: Iterable[str], ranks: Ranks = ALONE) -> dict[str, FileRecord]:
    """Return size and SHA-256 of files; rank r reads names[r :: ranks.size]."""
    names = list(names)
    digests = torch.zeros(len(names), 32, dtype=torch.uint8)
    sizes = torch.zeros(len(names), dtype=torch.int64)

    def hash_own() -> None:
        for i in range(ranks.rank, len(names), ranks.size):
            with (folder / names[i]).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").digest()
                digests[i] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
                sizes[i] = stream.tell()

    ranks.run(f"hashing the files of {folder}", hash_own)
    ranks.sum(digests)
    ranks.sum(sizes)
    return {
        name: FileRecord(int(size), bytes(digest.tolist()).hex())
        for name, size, digest in zip(names, sizes, digests, strict=True)
    }


def _survey(folder: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Compare names and sizes; return the problems, and the digests that the other files need."""
    if not folder.is_dir():
        return [(str(folder), "is not a folder")], {}
    try:
        manifest = read_manifest(folder)
    except CorruptCheckpointError as error:
        return [(MANIFEST, f"is bad: {error}")], {}
    present = {entry.name: entry for entry in os.scandir(folder) if entry.name != MANIFEST}
    problems = [
        (name, "is not in the manifest") for name in sorted(present.keys() - manifest.files.keys())
    ]
    expected = {}
    for name, record in manifest.files.items():
        if name not in present:
            problems.append((name, "is missing"))
        elif not present[name].is_file(follow_symlinks=False):
            problems.append((name, "is not a plain file"))
        elif (size := present[name].stat().st_size) != record.bytes:
            problems.append((name, f"has {size} bytes, {record.bytes} were saved"))
        else:
            expected[name] = record.sha256
    return problems, expected


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
