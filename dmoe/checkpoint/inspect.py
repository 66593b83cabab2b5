"""Look into a checkpoint without loading it: only headers of tensor files are read.

Used by the commands `dmoe checkpoint inspect` and `verify`.
"""

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.checkpoint.manifest import CorruptCheckpointError, Problem, find_problems, read_manifest
from dmoe.checkpoint.metadata import Metadata, read_metadata

_DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class TensorInfo:
    """One tensor under its global name, put together from the shards of all files."""

    shape: tuple[int, ...]
    dtype: str
    """Name in the safetensors format, such as BF16."""
    bytes: int


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint folder says of itself; its data is not verified."""

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    bytes_by_kind: dict[str, int]
    """Bytes of tensors by the first part of their names, such as model and optimizer."""


@dataclass(frozen=True)
class _Shard:
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Read the metadata and the tensor headers of a checkpoint folder.

    Raises:
        CorruptCheckpointError: a file is missing, or not of the format it should have.
    """
    shards: dict[str, list[_Shard]] = {}
    for name in sorted(read_manifest(path).files):
        if name.endswith(".safetensors"):
            for tensor, shard in _read_header(path / Path(name).name).items():
                shards.setdefault(tensor, []).append(shard)
    tensors = {name: _assemble(path, name, parts) for name, parts in sorted(shards.items())}
    bytes_by_kind: Counter[str] = Counter()
    for name, info in tensors.items():
        bytes_by_kind[name.split(".")[0]] += info.bytes
    return CheckpointInfo(path, read_metadata(path), tensors, dict(bytes_by_kind))


def verify_checkpoint(path: Path) -> list[Problem]:
    """Return every way in which the files differ from what was saved; an intact folder has none."""
    return find_problems(path)


def _read_header(path: Path) -> dict[str, _Shard]:
    """Return the shards that a file claims to hold, each checked against the file's size."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _HEADER_LIMIT):
                raise CorruptCheckpointError(f"{path}: header of {length} bytes in {size} of file")
            header = json.loads(stream.read(length))
        notes = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        data_bytes = size - 8 - length
        return {
            name: _check_shard(entry, notes[name]["saved_offsets"], data_bytes)
            for name, entry in header.items()
        }
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: bad header: {error!r}") from error


def _check_shard(entry: dict[str, Any], offset: list[int], data_bytes: int) -> _Shard:
    shape, dtype, (begin, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
    numbers = [*shape, *offset, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"negative or fractional number in {entry}")
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}")
    num_bytes = math.prod(shape) * _DTYPE_BYTES[dtype]
    if len(offset) != len(shape) or num_bytes != end - begin or end > data_bytes:
        raise ValueError(f"shape {shape} of {dtype} does not fit bytes {begin} to {end}")
    return _Shard(tuple(offset), tuple(shape), dtype, num_bytes)


def _assemble(path: Path, name: str, shards: list[_Shard]) -> TensorInfo:
    """Join the shards of one tensor; together they must fill it."""
    first = shards[0]
    if any(s.dtype != first.dtype or len(s.shape) != len(first.shape) for s in shards):
        raise CorruptCheckpointError(f"{path}: shards of {name} differ in dtype or dimensions")
    ends = [[o + n for o, n in zip(s.offset, s.shape, strict=True)] for s in shards]
    shape = tuple(map(max, zip(*ends, strict=True)))
    info = TensorInfo(shape, first.dtype, sum(shard.bytes for shard in shards))
    if math.prod(shape) * _DTYPE_BYTES[first.dtype] != info.bytes:
        raise CorruptCheckpointError(f"{path}: shards of {name} do not fill its shape {shape}")
    return info
