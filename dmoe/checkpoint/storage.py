"""Tensors to and from plain safetensors files, through torch.distributed.checkpoint.

Tensors go by global name: DTensors with their global shape, and plain tensors that are equal on all
ranks. Files therefore load on any number of ranks and any mesh. Used by manager.
"""

import heapq
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from dmoe.checkpoint.ranks import ALONE, CheckpointError, Ranks, describe_failure

_SHOWN = 8  # names listed in an error, of possibly thousands


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes, copied to host memory: later changes of the tensors do not reach it."""

    plan: SavePlan
    shards: dict[str, Tensor]


def snapshot(tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> Snapshot:
    """Copy this rank's share of the tensors; all ranks give the same names.

    Raises:
        CheckpointError: on every rank, where ranks differ in names, global shapes or dtypes.
    """
    layout = _layout(tensors)
    first = ranks.share("listing the tensors", lambda: layout)
    ranks.run("comparing the tensors with those of rank 0", lambda: _compare(first, layout))
    own = _deal_out(tensors, ranks)
    # A fresh contiguous copy of each, also because safetensors refuses strided and shared memory.
    shards = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        .detach()
        .to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in own.items()
    }
    return Snapshot(create_default_local_save_plan(own, ranks.is_leader), shards)


def save_tensors(snapshot: Snapshot, folder: Path, ranks: Ranks = ALONE) -> None:
    """Write the snapshots of all ranks as safetensors files into a folder.

    Raises:
        CheckpointError: on every rank, with the rank that failed and why.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    # All data is on the host. With copy-ahead the writer would open a CUDA context on device 0.
    writer.per_thread_copy_ahead = 0
    planner = _SnapshotPlanner(snapshot)
    _call_dcp(
        f"writing tensors to {folder}",
        lambda: dcp.save({}, storage_writer=writer, planner=planner, **_team(ranks)),
    )


def load_tensors(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks = ALONE) -> None:
    """Fill the tensors, of any layout, in place with the saved ones of the same names.

    Args:
        tensors: all of a part ("model", "optimizer": the first word of a name), or none of it.
        folder: the checkpoint.
        ranks: that load together.

    Raises:
        CheckpointError: on every rank; where names, shapes or dtypes differ, nothing was changed.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    _call_dcp(
        f"reading tensors from {folder}",
        lambda: dcp.load(
            dict(tensors), storage_reader=reader, planner=_StrictPlanner(), **_team(ranks)
        ),
    )


class _SnapshotPlanner(dcp.DefaultSavePlanner):
    """Writes a plan made earlier: saving needs neither the live tensors nor their device."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(flatten_state_dict=False)
        self._snapshot = snapshot

    def create_local_plan(self) -> SavePlan:
        return self._snapshot.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._snapshot.shards[write_item.index.fqn]


class _StrictPlanner(dcp.DefaultLoadPlanner):
    """Compares what is saved with what is asked for, before any rank reads."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        # A part may be left out whole, as the optimizer is where a model alone is loaded.
        parts = {name.partition(".")[0] for name in state_dict}
        saved = {
            name: f"{entry.properties.dtype} {list(entry.size)}"
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.partition(".")[0] in parts
        }
        _compare(saved, _layout(state_dict))
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def _compare(saved: dict[str, str], expected: dict[str, str]) -> None:
    differences = [
        f"{name}: saved {saved.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(f"tensors differ: {'; '.join(differences[:_SHOWN])}{more}")


def _deal_out(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return what this rank copies and writes: its DTensor shards, and some of the plain tensors.

    DCP would also write a plain tensor once, but only after every rank had copied all of them.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    own = {name: tensor for name, tensor in tensors.items() if name not in plain}
    loads = [(0, rank) for rank in range(ranks.size)]
    for name in sorted(plain, key=lambda name: (-plain[name].nbytes, name)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + plain[name].nbytes, rank))
        if rank == ranks.rank:
            own[name] = plain[name]
    return own


def _team(ranks: Ranks) -> dict[str, Any]:
    return {"process_group": ranks.group, "no_dist": ranks.group is None}


def _call_dcp(what: str, action: Callable[[], object]) -> None:
    """Call a DCP function, which raises on all ranks or on none, and turn its error into ours."""
    try:
        with warnings.catch_warnings():
            # To work without a process group is a choice here, not an oversight.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            action()
    except CheckpointException as error:
        rank = min(error.failures)
        cause, _ = error.failures[rank]
        raise CheckpointError(describe_failure(what, rank, cause)) from error
