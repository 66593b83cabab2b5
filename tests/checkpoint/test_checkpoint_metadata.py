import math

import pytest
import torch
import yaml

from dmoe.checkpoint.manifest import CorruptCheckpointError
from dmoe.checkpoint.metadata import Metadata, encode_documents, read_metadata
from dmoe.checkpoint.ranks import CheckpointError

CONFIG = {"run": {"name": "ü"}, "model": {"dims": [1, 2]}, "optim": {"lr": 3e-4}}


def test_what_is_written_is_read_back_equal(tmp_path):
    parts = {"schedule": {"lr": 0.1 + 0.2}, "data": {"seed": 2**63}, "progress": {"name": "ü"}}
    metadata = Metadata(step=3, eval_loss=1 / 3, parts=parts)
    for name, data in encode_documents(metadata, CONFIG).items():
        (tmp_path / name).write_bytes(data)
    assert read_metadata(tmp_path) == metadata
    assert yaml.safe_load((tmp_path / "config.yaml").read_bytes()) == CONFIG


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.ones(1), {1, 2}, b"x"])
def test_what_cannot_be_read_back_is_refused(value):
    with pytest.raises(CheckpointError, match="cannot be saved"):
        encode_documents(Metadata(1, None, {"progress": value}), {})
    with pytest.raises(CheckpointError, match="cannot be saved"):
        encode_documents(Metadata(1, None, {}), {"path": object()})


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 1}', "[" * 100_000])
def test_other_content_is_refused(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"metadata\.json"):
        read_metadata(tmp_path)
