"""The ranks that save and load together: what fails on one of them raises on all.

Used by commit, storage and manager. Messages travel as bytes of JSON, never as pickled objects.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """Saving or loading failed; raised on every rank, with the cause and the rank it came from."""


def describe_failure(what: str, rank: int, cause: BaseException) -> str:
    """Return one line that says what failed, on which rank and why."""
    kind = "" if isinstance(cause, CheckpointError) else f"{type(cause).__name__}: "
    return f"{what} failed on rank {rank}: {kind}{cause}"


@dataclass(frozen=True)
class Ranks:
    """A gloo process group seen as a team; `Ranks()` is a team of one, with or without torchrun.

    Every method is a collective: all ranks call it in the same order.
    """

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Return this process's place in the team."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def is_leader(self) -> bool:
        """Tell whether this is the rank that creates, renames and deletes folders."""
        return self.rank == 0

    def run(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` on every rank and return this rank's result.

        Raises:
            CheckpointError: on all ranks if `action` raised on any; it names the lowest such rank.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        failed = torch.tensor(self.size if failure is None else self.rank)
        if self.group is not None:
            dist.all_reduce(failed, dist.ReduceOp.MIN, group=self.group)
        rank = int(failed)
        if rank < self.size:
            text = describe_failure(what, rank, failure) if failure is not None else ""
            raise CheckpointError(self._broadcast(text, rank)) from failure
        return result

    def share(self, what: str, action: Callable[[], Any]) -> Any:
        """Call `action` on the leader alone and return its JSON result on every rank.

        Raises:
            CheckpointError: on all ranks if `action` raised.
        """
        return self._broadcast(self.run(what, lambda: action() if self.is_leader else None), 0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise sum over the ranks, written into `tensor` itself."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def _broadcast(self, value: Any, source: int) -> Any:
        if self.group is None:
            return value
        payload = bytearray(json.dumps(value).encode())
        size = torch.tensor(len(payload))
        dist.broadcast(size, group_src=source, group=self.group)
        if self.rank == source:
            data = torch.frombuffer(payload, dtype=torch.uint8)
        else:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, group_src=source, group=self.group)
        return json.loads(data.numpy().tobytes())


ALONE = Ranks()
