import json
import math

import pytest

from dmoe.metrics import JsonlWriter, read_metrics


def write(path, rows):
    writer = JsonlWriter(path)
    for row in rows:
        writer.write(row)
    writer.close()


ROWS = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.5},
    {"step": 2, "eval_loss": 2.4, "k": None},
    {"step": 3, "loss": 2.0},
]


def test_rows_are_on_disk_as_soon_as_written(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for count, row in enumerate(ROWS, start=1):
        writer.write(row)
        assert read_metrics(tmp_path / "m.jsonl") == ROWS[:count]
    writer.close()


def test_values_that_are_not_finite_become_null_and_are_listed(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [{"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1}])
    assert read_metrics(path) == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "non_finite": ["loss", "grad_norm"]}
    ]
    json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', "\0\0\0"])
def test_a_resumed_file_equals_that_of_a_straight_run(tmp_path, torn):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    write(straight, ROWS)
    write(resumed, ROWS)
    with resumed.open("a") as file:
        file.write(torn)
    writer = JsonlWriter(resumed)
    writer.truncate_after(2)
    assert read_metrics(resumed) == ROWS[:3]
    writer.write(ROWS[3])
    writer.close()
    assert resumed.read_bytes() == straight.read_bytes()


def test_truncation_to_before_the_first_row_and_after_the_last(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, ROWS)
    writer = JsonlWriter(path)
    writer.truncate_after(9)
    assert read_metrics(path) == ROWS
    writer.truncate_after(0)
    assert read_metrics(path) == []
    writer.close()


def test_a_torn_line_is_removed_on_opening_and_skipped_by_readers(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, ROWS[:1])
    with path.open("a") as file:
        file.write('{"step": 2')
    assert read_metrics(path) == ROWS[:1]
    write(path, ROWS[1:])
    assert read_metrics(path) == ROWS


@pytest.mark.parametrize("line", ["{torn}", "[1]", "3"])
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: not a row of metrics"):
        read_metrics(path)
