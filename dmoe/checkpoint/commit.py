"""The commit protocol: how a folder of files becomes a checkpoint, whole or not at all.

    checkpoints/step_00000100/{*.safetensors, metadata.json, config.yaml, manifest.json}
    checkpoints/latest          the name of the folder to resume from

Files are written and synced under `.tmp-step_00000100`; then come the manifest, the rename and the
pointer. Used by manager.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from dmoe.checkpoint.manifest import (
    MANIFEST,
    CorruptCheckpointError,
    Manifest,
    hash_files,
    step_name,
)
from dmoe.checkpoint.ranks import ALONE, Ranks
from dmoe.config.base import ConfigError

_LATEST = "latest"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".tmp-"  # unfinished or half deleted: never of use
_ASIDE = ".old-"  # a whole checkpoint, moved out of the way of its replacement

_log = logging.getLogger(__name__)


def commit(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    ranks: Ranks = ALONE,
    failpoint: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write one checkpoint and publish it as the latest, replacing one of the same step.

    Args:
        root: the folder that holds the checkpoints of a run.
        step: training step, the name of the checkpoint.
        write: fills the folder that it is given; collective, raises on all ranks or on none.
        ranks: the ranks that write; all of them call this.
        failpoint: called with the name of each point at which tests kill the process.

    Returns:
        The published folder.

    Raises:
        CheckpointError: on every rank; earlier checkpoints and the pointer are as they were.
    """
    folder = root / step_name(step)
    temporary = root / f"{_TEMPORARY}{folder.name}"
    try:
        ranks.share(f"creating {temporary}", lambda: _make_empty(temporary))
        write(temporary)
        failpoint("after_shards")
        names = ranks.share("listing the files", lambda: sorted(os.listdir(temporary)))
        # Not left to the writers: torch's calls fsync before it flushes the last bytes of a file.
        ranks.run("syncing the files", lambda: _sync(temporary, names[ranks.rank :: ranks.size]))
        manifest = Manifest(step, hash_files(temporary, names, ranks))
        ranks.share(
            f"publishing {folder}", lambda: _publish(temporary, folder, manifest, failpoint)
        )
    except RuntimeError:  # a CheckpointError, or a collective that lost its peer
        if ranks.is_leader:
            recover(root)
        raise
    return folder


def recover(root: Path) -> None:
    """Undo what a killed or failed save left behind; for the one process that writes to `root`."""
    for path in root.glob(".*") if root.exists() else ():
        target = root / path.name.removeprefix(_ASIDE)
        if path.name.startswith(_ASIDE) and not target.exists():
            os.rename(path, target)
        elif path.name.startswith((_ASIDE, _TEMPORARY)):
            discard(path)


def discard(path: Path) -> None:
    """Delete a path so that no half of it is taken for a checkpoint; to fail is harmless."""
    try:
        if not path.name.startswith(_TEMPORARY):
            path = path.rename(path.with_name(_TEMPORARY + path.name))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        _log.warning("could not delete %s: %s", path, error)


def saved_steps(root: Path) -> dict[int, Path]:
    """Return the published folders by ascending step; their content is not checked."""
    folders = {
        int(match[1]): path
        for path in (root.iterdir() if root.exists() else ())
        if (match := _STEP_NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return dict(sorted(folders.items()))


def read_latest(root: Path) -> int | None:
    """Return the step that the `latest` pointer names, or None where there is no pointer.

    Raises:
        CorruptCheckpointError: the pointer holds anything but the name of a step folder in `root`.
    """
    pointer = root / _LATEST
    try:
        with pointer.open("rb") as stream:
            name = stream.read(100).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    match = _STEP_NAME.fullmatch(name)
    if not match or (root / name).is_symlink():
        raise CorruptCheckpointError(
            f"{pointer} holds {name!r}, which is not the name of a checkpoint folder beside it, "
            f"such as {step_name(100)!r}; correct the file, or remove it to use the newest folder"
        )
    return int(match[1])


def latest_step(root: Path) -> int | None:
    """Return the step of the last published checkpoint, or None where there is none.

    Raises:
        CorruptCheckpointError: as `read_latest`.
    """
    step = read_latest(root)
    if step is None:  # the very first save was killed just before it wrote the pointer
        step = max(saved_steps(root), default=None)
    return step


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a user means by a checkpoint or a run folder.

    Raises:
        ConfigError: there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    for root in (path / "checkpoints", path):
        step = latest_step(root) if root.is_dir() else None
        if step is not None:
            return root / step_name(step)
    raise ConfigError(
        f"{path} is neither a checkpoint folder nor a run folder with checkpoints: give "
        f"runs/NAME, or runs/NAME/checkpoints/step_00000100"
    )


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(
    temporary: Path, folder: Path, manifest: Manifest, failpoint: Callable[[str], None]
) -> None:
    failpoint("before_manifest")
    (temporary / MANIFEST).write_bytes(manifest.encode())
    _sync(temporary, [MANIFEST, "."])
    failpoint("before_rename")
    aside = folder.with_name(_ASIDE + folder.name)
    if folder.exists():
        os.rename(folder, aside)
    os.rename(temporary, folder)
    _sync(folder.parent, ["."])
    failpoint("after_rename_before_latest")
    pointer = folder.with_name(_TEMPORARY + _LATEST)
    pointer.write_text(folder.name)
    _sync(folder.parent, [pointer.name])
    os.replace(pointer, folder.with_name(_LATEST))
    _sync(folder.parent, ["."])
    if aside.exists():
        discard(aside)


def _sync(folder: Path, names: Iterable[str]) -> None:
    """Wait until the disk has these files of a folder, or with "." its list of names."""
    for name in names:
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
