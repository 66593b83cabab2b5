"""Saving, resuming and deleting the checkpoints of a run, for the trainer."""

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from dmoe.checkpoint.commit import (
    commit,
    discard,
    find_checkpoint,
    latest_step,
    read_latest,
    recover,
    saved_steps,
)
from dmoe.checkpoint.manifest import CorruptCheckpointError, step_name, verify
from dmoe.checkpoint.metadata import Metadata, encode_documents, read_metadata
from dmoe.checkpoint.ranks import ALONE, CheckpointError, Ranks
from dmoe.checkpoint.retention import best_step, expired_steps
from dmoe.checkpoint.storage import Snapshot, load_tensors, save_tensors, snapshot
from dmoe.config.base import ConfigError, ConfigModel

_log = logging.getLogger(__name__)

PartsCheck = Callable[[dict[str, Any]], None]


class CheckpointConfig(ConfigModel):
    """When to save, what to keep, and where to resume from."""

    every: int = Field(default=0, ge=0)
    """Save every n steps; 0 saves only at the end of training."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints to keep; with 1, a damaged one has no predecessor."""
    keep_every: int = Field(default=0, ge=0)
    """Also keep those whose step is a multiple of n steps; 0 keeps none for this reason."""
    keep_best: bool = True
    """Also keep the one of lowest evaluation loss."""
    async_save: bool = False
    """Write in the background, from a copy of the state in host memory."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` continues from the run's latest intact checkpoint if it has any, `must` fails without
    one, `never` starts anew, in a run folder that has none."""
    resume_from: Path | None = None
    """A run or checkpoint folder to start from where the run has none of its own."""

    @model_validator(mode="after")
    def _resumes_or_not(self) -> "CheckpointConfig":
        if self.resume == "never" and self.resume_from is not None:
            raise ConfigError(
                f"resume = never, but resume_from = {self.resume_from}: unset one of them",
                key="resume_from",
            )
        return self


class CheckpointManager:
    """The checkpoints of one run, written by all ranks of it.

    All ranks make it, and call `save`, `load`, `resume` and `close`, in the same order.

    Args:
        root: folder of the run's checkpoints; one running program at a time writes there.
        config: the `checkpoint` section.
        failpoint: called with the name of each point of the commit at which tests kill the process.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        *,
        failpoint: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.root = root
        self._config = config
        self._failpoint = failpoint
        # A CPU group of its own: a save in the background must not mix with training's collectives.
        self._ranks = Ranks(dist.new_group(backend="gloo")) if dist.is_initialized() else ALONE
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._ranks.share(f"cleaning {root}", lambda: recover(root))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        parts: dict[str, Any],
        config_tree: dict[str, Any],
        *,
        eval_loss: float | None = None,
        block: bool = False,
    ) -> None:
        """Save one step; with `async_save`, return as soon as the state is copied, unless `block`.

        A save that is still under way is waited for first.

        Args:
            step: training step; a checkpoint of the same step is replaced.
            tensors: by global name: DTensors of global shape, or plain tensors equal on all ranks.
            parts: JSON by part, for everything but tensors; the leader's are saved.
            config_tree: the resolved config, written as config.yaml.
            eval_loss: nats a token, if this step was evaluated.
            block: return only when the checkpoint is published.

        Raises:
            CheckpointError: on every rank: this save failed, or the one before it.
        """
        if self._pending and not self._pending.done():
            _log.info("the save of step %d waits for the one before it", step)
        self.wait()
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._ranks.share(f"saving step {step}", lambda: self._check_space(needed))
        documents = self._ranks.run(
            f"saving step {step}",
            lambda: encode_documents(Metadata(step, eval_loss, parts), config_tree),
        )
        job = partial(self._write, step, snapshot(tensors, self._ranks), documents, needed)
        if self._config.async_save and not block:
            self._pending = self._executor.submit(job)
        else:
            job()

    def check(self) -> None:
        """Raise the error of a failed background save; call it at each step, it never waits."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any, and raise its error if it failed."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Finish the save under way and give back thread and process group."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            if self._ranks.group is not None:
                dist.destroy_process_group(self._ranks.group)

    def latest(self) -> Path | None:
        """Return the folder of the last published checkpoint, or None where there is none.

        Raises:
            CorruptCheckpointError: the `latest` file does not hold the name of a step folder.
        """
        step = latest_step(self.root)
        return None if step is None else self.root / step_name(step)

    def best(self) -> Path | None:
        """Return the folder of lowest evaluation loss, or None where no step was evaluated."""
        step = best_step(_eval_losses(self.root))
        return None if step is None else saved_steps(self.root)[step]

    def load(
        self,
        path: Path | Literal["latest"],
        tensors: Mapping[str, Tensor],
        check: PartsCheck | None = None,
    ) -> dict[str, Any]:
        """Verify a checkpoint, fill `tensors` in place from it, and return its parts.

        Args:
            path: the checkpoint.
            tensors: by global name, in any layout.
            check: called with the parts before any tensor is changed; may raise.

        Raises:
            CorruptCheckpointError: on every rank: the folder is damaged; nothing was changed.
            CheckpointError: on every rank: names, shapes or dtypes differ; nothing was changed.
        """
        self.wait()
        if path == "latest":
            found = self._ranks.share("reading latest", lambda: str(self.latest() or ""))
            if not found:
                raise CheckpointError(f"{self.root} holds no checkpoint")
            path = Path(found)
        return load_checkpoint(Path(path), tensors, self._ranks, check).parts

    def resume(
        self, tensors: Mapping[str, Tensor], check: PartsCheck | None = None
    ) -> dict[str, Any] | None:
        """Fill `tensors` from where the config says and return the parts, or None to start anew.

        A damaged checkpoint is reported and the one before it is tried. `check` is that of `load`.

        Raises:
            ConfigError: `resume` is "must" and there is nothing to resume from.
            CheckpointError: on every rank: none is intact, or one that is does not fit the model.
        """
        if self._config.resume == "never":
            return None
        try:
            candidates = self._ranks.share(
                "listing checkpoints", lambda: [str(path) for path in self._candidates()]
            )
        except CheckpointError as error:
            raise error.__cause__ if isinstance(error.__cause__, ConfigError) else error from None
        if not candidates:
            if self._config.resume == "must":
                raise ConfigError(
                    f"checkpoint.resume is 'must', but {self.root} holds no checkpoint; set "
                    "checkpoint.resume=auto to start anew, or checkpoint.resume_from=FOLDER"
                )
            return None
        damage = []
        for candidate in candidates:
            try:
                return self.load(Path(candidate), tensors, check)
            except CorruptCheckpointError as error:
                damage.append(str(error))
                self._warn("cannot resume: %s; trying the checkpoint before it", error)
        raise CheckpointError(
            f"no checkpoint to resume from is intact: {'; '.join(damage)}; restore one, or "
            "take another run.name to start anew"
        )

    def _candidates(self) -> list[Path]:
        """Return the folders to resume from, best first: `latest`, then the steps before it."""
        saved = saved_steps(self.root)
        try:
            pointed = read_latest(self.root)
        except CorruptCheckpointError as error:
            self._warn("%s; resuming from the newest folder", error)
            pointed = None
        if pointed is None:
            steps = list(saved)
        else:
            steps = [*(step for step in saved if step < pointed), pointed]
        if not steps and self._config.resume_from is not None:
            return [find_checkpoint(self._config.resume_from)]
        return [self.root / step_name(step) for step in reversed(steps)]

    def _write(
        self, step: int, snapshot: Snapshot, documents: dict[str, bytes], needed: int
    ) -> None:
        def write(folder: Path) -> None:
            save_tensors(snapshot, folder, self._ranks)
            self._ranks.share(f"writing to {folder}", lambda: _write_all(folder, documents))

        try:
            commit(self.root, step, write, self._ranks, self._failpoint)
        except RuntimeError as error:  # a CheckpointError, or a collective that lost its peer
            raise CheckpointError(
                f"saving step {step} failed; earlier checkpoints are kept: {error} "
                f"({self._space(needed)})"
            ) from error
        if self._ranks.is_leader:
            self._delete_expired(step)

    def _delete_expired(self, latest: int) -> None:
        """Apply the retention rule; no other rank waits, and no failure of it fails the save."""
        saved = saved_steps(self.root)
        config = self._config
        for step in expired_steps(
            _eval_losses(self.root),
            latest,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
        ):
            discard(saved[step])

    def _check_space(self, needed: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.root).free < needed:
            raise CheckpointError(
                f"not enough disk space: {self._space(needed)}; delete files there, or lower "
                "checkpoint.keep_last"
            )

    def _space(self, needed: int) -> str:
        free = shutil.disk_usage(self.root).free
        return f"needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free in {self.root}"

    def _warn(self, message: str, *args: object) -> None:
        if self._ranks.is_leader:
            _log.warning(message, *args)


def load_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    ranks: Ranks = ALONE,
    check: PartsCheck | None = None,
) -> Metadata:
    """Verify one checkpoint folder, fill `tensors` in place, and return the rest of what it holds.

    Usable without a manager, in one process or on `ranks`; raises as `CheckpointManager.load`.
    """
    verify(path, ranks)
    metadata = ranks.run(f"reading {path}", lambda: read_metadata(path))
    if check is not None:
        check(metadata.parts)
    load_tensors(tensors, path, ranks)
    return metadata


def _eval_losses(root: Path) -> dict[int, float | None]:
    losses = {}
    for step, folder in saved_steps(root).items():
        try:
            losses[step] = read_metadata(folder).eval_loss
        except CorruptCheckpointError as error:
            _log.warning("%s; taken as not evaluated", error)
            losses[step] = None
    return losses


def _write_all(folder: Path, documents: dict[str, bytes]) -> None:
    for name, data in documents.items():
        (folder / name).write_bytes(data)
