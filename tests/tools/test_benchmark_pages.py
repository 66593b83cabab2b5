"""The page of results that a benchmark writes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks"))
import harness


def test_each_processor_has_a_page_whose_sections_are_replaced(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    for processor, name, figures in (
        ("Intel(R) Xeon(R) Processor", "Layer", "1"),
        ("AMD EPYC", "Layer", "2"),
        ("AMD EPYC", "Another", "3"),
        ("AMD EPYC", "Layer", "4"),
    ):
        monkeypatch.setattr(harness, "_processor", lambda processor=processor: processor)
        harness.report(name, "What.", ["ms"], [[figures]])
    pages = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(pages) == {"cpu_intel_xeon.md", "cpu_amd_epyc.md"}
    lines = pages["cpu_amd_epyc.md"].splitlines()
    assert lines[0] == "# CPU benchmarks: AMD EPYC"
    assert [line for line in lines if line.startswith("## ")] == ["## Another", "## Layer"]
    assert [line for line in lines if line.startswith("| ") and line[2].isdigit()] == [
        "| 3  |",
        "| 4  |",
    ]
    assert "| 1  |" in pages["cpu_intel_xeon.md"]
