"""The Megatron format, against bytes written out by hand."""

import struct

import numpy as np
import pytest

from dmoe.config.base import ConfigError
from dmoe.data.indexed import IndexedWriter, read_indexed

# Two documents, [5, 6, 9] and [7, 9], with end-of-document 9.
BIN = struct.pack("<5H", 5, 6, 9, 7, 9)
HEADER = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8) + struct.pack("<QQ", 2, 3)
IDX = HEADER + struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)


@pytest.fixture
def prefix(tmp_path):
    (tmp_path / "data.v1.bin").write_bytes(BIN)
    (tmp_path / "data.v1.idx").write_bytes(IDX)
    return tmp_path / "data.v1"


def rewrite(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def test_reads_hand_built_bytes(prefix):
    ids, starts = read_indexed(prefix)
    assert ids.tolist() == [5, 6, 9, 7, 9]
    assert ids.dtype == np.uint16
    assert starts.tolist() == [0, 3, 5]
    assert not ids.flags.writeable


def test_writes_the_same_bytes(tmp_path):
    with IndexedWriter(tmp_path / "out", vocab_size=10, eod_id=9) as writer:
        writer.add(np.array([5, 6]))
        writer.add(np.array([7]))
        assert writer.num_documents == 2
    assert (tmp_path / "out.bin").read_bytes() == BIN
    assert (tmp_path / "out.idx").read_bytes() == IDX


@pytest.mark.parametrize(
    ("code", "kind"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")]
)
def test_reads_every_integer_type(tmp_path, code, kind):
    size = struct.calcsize(kind)
    (tmp_path / "t.bin").write_bytes(struct.pack(f"<3{kind}", 1, 2, 3))
    header = HEADER[:17] + struct.pack("<BQQ", code, 2, 3)
    index = struct.pack("<2i2q3q", 2, 1, 0, 2 * size, 0, 1, 2)
    (tmp_path / "t.idx").write_bytes(header + index)
    ids, starts = read_indexed(tmp_path / "t")
    assert ids.tolist() == [1, 2, 3]
    assert starts.tolist() == [0, 2, 3]


def test_wide_vocabulary_takes_four_bytes(tmp_path):
    with IndexedWriter(tmp_path / "wide", vocab_size=100_000, eod_id=99_999) as writer:
        writer.add(np.array([70_000]))
    ids, _ = read_indexed(tmp_path / "wide")
    assert ids.dtype == np.int32
    assert ids.tolist() == [70_000, 99_999]


def test_documents_of_several_sequences_and_modes(prefix):
    """One document of both sequences, an empty one, and the mode bytes of a multimodal file."""
    index = HEADER + IDX[34:58] + struct.pack("<3q", 0, 2, 2) + b"\x00\x01"
    prefix.with_name("data.v1.idx").write_bytes(index)
    assert read_indexed(prefix)[1].tolist() == [0, 5, 5]


def test_failed_write_leaves_nothing(tmp_path):
    def write():
        with IndexedWriter(tmp_path / "out", vocab_size=10, eod_id=9) as writer:
            writer.add(np.array([1]))
            raise RuntimeError("reader broke")

    with pytest.raises(RuntimeError, match="reader broke"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", r"byte 0: not a Megatron index"),
        (9, b"\x02", r"byte 9: index version 2"),
        (17, b"\x07", r"byte 17: token type code 7"),
        (18, b"\x03", r"ends at byte 82, but its header .* 3 sequences"),
        (26, b"\x04", r"ends at byte 82, but its header .* 4 document indices"),
        (38, struct.pack("<i", -2), r"byte 38: a negative sequence length \(entry 1\)"),
        (34, struct.pack("<i", 4), r"byte 50: a byte pointer .* \(entry 1\)"),
        (50, struct.pack("<q", 8), r"byte 50: a byte pointer .* \(entry 1\)"),
        (58, struct.pack("<q", 1), r"byte 58: a document boundary out of order \(entry 0\)"),
        (66, struct.pack("<q", 3), r"byte 66: a document boundary out of order \(entry 1\)"),
        (74, struct.pack("<q", 1), r"byte 74: a document boundary out of order \(entry 2\)"),
    ],
)
def test_altered_index(prefix, offset, content, message):
    rewrite(prefix.with_name("data.v1.idx"), offset, content)
    with pytest.raises(ConfigError, match=r"data\.v1\.idx: " + message):
        read_indexed(prefix)


@pytest.mark.parametrize("size", [0, 20, 34, 60, 81])
def test_truncated_index(prefix, size):
    index = prefix.with_name("data.v1.idx")
    index.write_bytes(IDX[:size])
    with pytest.raises(ConfigError, match=rf"data\.v1\.idx: ends at byte {size}, "):
        read_indexed(prefix)


def test_bin_of_the_wrong_size(prefix):
    tokens = prefix.with_name("data.v1.bin")
    tokens.write_bytes(BIN[:7])
    with pytest.raises(
        ConfigError, match=r"data\.v1\.bin: ends early, at byte 7, .* 10 bytes \(5 tokens of 2"
    ):
        read_indexed(prefix)
    tokens.write_bytes(BIN + b"\x00")
    with pytest.raises(ConfigError, match=r"data\.v1\.bin: has extra bytes: it ends at byte 11"):
        read_indexed(prefix)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_file(prefix, ending):
    prefix.with_name(f"data.v1{ending}").unlink()
    with pytest.raises(ConfigError, match=rf"data\.v1\{ending}: No such file"):
        read_indexed(prefix)


def test_nothing_to_predict(tmp_path):
    with IndexedWriter(tmp_path / "none", vocab_size=10, eod_id=9):
        pass
    with pytest.raises(ConfigError, match=r"none\.bin: holds 0 tokens"):
        read_indexed(tmp_path / "none")
