import json
import struct

import pytest
import torch

from dmoe.checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    CorruptCheckpointError,
    inspect_checkpoint,
)
from dmoe.checkpoint.inspect import TensorInfo
from dmoe.checkpoint.manifest import Manifest, hash_files
from dmoe.checkpoint.storage import save_tensors, snapshot

NOTES = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [0]}})}
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_names_shapes_and_sizes(tmp_path):
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    state = {
        "model.w": torch.ones(4, 3, dtype=torch.bfloat16),
        "model.empty": torch.ones(0, 2),
        "optimizer.exp_avg.w": torch.ones(4, 3),
        "optimizer.step": torch.tensor(1),
    }
    manager.save(5, state, {"progress": {"tokens": 10}}, {}, eval_loss=2.5)
    info = inspect_checkpoint(manager.latest())
    manager.close()
    assert (info.metadata.step, info.metadata.eval_loss) == (5, 2.5)
    assert info.metadata.parts == {"progress": {"tokens": 10}}
    assert info.tensors == {
        "model.empty": TensorInfo((0, 2), "F32", 0),
        "model.w": TensorInfo((4, 3), "BF16", 24),
        "optimizer.exp_avg.w": TensorInfo((4, 3), "F32", 48),
        "optimizer.step": TensorInfo((), "I64", 8),
    }
    assert info.bytes_by_kind == {"model": 24, "optimizer": 56}


def with_file(folder, name, data):
    """A folder with a good manifest around what an attacker or a bug wrote."""
    (folder / name).write_bytes(data)
    files = hash_files(folder, [path.name for path in folder.glob("*.safetensors")])
    (folder / "manifest.json").write_bytes(Manifest(1, files).encode())
    return folder


def header(content, data=b"\0" * 8):
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header of"),
        (b"\xff" * 8, "header of 18446744073709551615 bytes in 8 of file"),
        (struct.pack("<Q", 2**40) + b"{}", "header of 1099511627776 bytes"),
        (header([]), "bad header"),
        (header({"w": GOOD}), "__metadata__"),
        (header({"__metadata__": NOTES, "v": GOOD}), "'v'"),
        (header({"__metadata__": NOTES, "w": {**GOOD, "shape": [2**40, 2**40]}}), "does not fit"),
        (header({"__metadata__": NOTES, "w": {**GOOD, "shape": [-2]}}), "negative or fractional"),
        (header({"__metadata__": NOTES, "w": {**GOOD, "shape": [2.0]}}), "negative or fractional"),
        (header({"__metadata__": NOTES, "w": {**GOOD, "shape": [1, 2]}}), "does not fit"),
        (header({"__metadata__": NOTES, "w": {**GOOD, "dtype": "F31"}}), "unknown dtype 'F31'"),
        (header({"__metadata__": NOTES, "w": {**GOOD, "data_offsets": [8, 16]}}), "does not fit"),
        (header({"__metadata__": NOTES, "w": 3}), "bad header"),
    ],
)
def test_absurd_headers_are_refused(tmp_path, data, message):
    with pytest.raises(CorruptCheckpointError, match=message):
        inspect_checkpoint(with_file(tmp_path, "w.safetensors", data))


@pytest.mark.parametrize(
    ("offset", "dtype", "message"), [(3, "F32", "do not fill"), (2, "I32", "differ in dtype")]
)
def test_shards_that_do_not_make_a_tensor(tmp_path, offset, dtype, message):
    save_tensors(snapshot({"w": torch.ones(2)}), tmp_path)
    notes = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [offset]}})}
    data = header({"__metadata__": notes, "w": {**GOOD, "dtype": dtype}})
    with pytest.raises(CorruptCheckpointError, match=message):
        inspect_checkpoint(with_file(tmp_path, "other.safetensors", data))
