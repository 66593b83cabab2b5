import os

import pytest

from dmoe.config.files import write_atomically


def test_content_is_replaced_and_nothing_is_left_beside(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("old")
    write_atomically(path, "néw\n")
    assert path.read_text(encoding="utf-8") == "néw\n"
    assert os.listdir(tmp_path) == ["x.yaml"]


def test_a_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.yaml"]
