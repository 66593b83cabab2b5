"""Every kernel compiles for its targets without a GPU, spills no register, uses the tensor cores.

The tests run the command, as this process has Triton interpret kernels. They need Triton's own
ptxas and cuobjdump, which its Linux wheels have.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")
aot = pytest.importorskip("dmoe_kernels.aot")

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "results" / "kernels_aot.md"


def compile_all(*arguments: str) -> str:
    """Run the command, which fails where a kernel has a fault, and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dmoe_kernels.aot", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        ("sm_80", "gemm"),
        ("sm_90", "up"),
        ("sm_90", "gemm_fp8"),
        ("gfx942", "dz"),
        ("sm_120", "gemm"),
    ],
)
def test_a_few_configs(target: str, kernel: str, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    printed = compile_all(kernel, "--target", target, "--first", "--out", str(out))
    tables = out.read_text()
    assert len(printed.splitlines()) == tables.count(f"\n| {kernel} |") > 0
    assert f", {target}\n" in tables


def test_tables_of_other_targets_stay(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    out.write_text("# Title\n\n## Triton 1.0, sm_80\n\nold\n\n## Triton 1.0, sm_90\n\nolder\n")
    for _ in range(2):
        compile_all("tiles", "--target", "sm_90", "--out", str(out))
    sections = [line for line in out.read_text().splitlines() if line.startswith("## ")]
    assert [name.split(", ")[1] for name in sections] == ["sm_80", "sm_90", "sm_90"]
    assert "\nold\n" in out.read_text()


@pytest.mark.parametrize("target", aot.IN_THE_PAGE)
def test_the_page_has_all_cases(target: str) -> None:
    """Of each release that it names; those in Gluon, which not every release has, left aside."""
    pages = re.findall(
        rf"^## Triton [\d.]+, {target}$(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S
    )
    want = [f"| {c.name} | {c.form} | {c.block} |" for c in aot.cases(target, first_only=False)]
    for page in pages:
        rows = re.findall(r"^\| \w+ \| .*? \| [\dx]+ \|", page, re.M)
        assert [row for row in rows if "Gluon" not in row] == [
            row for row in want if "Gluon" not in row
        ]
    assert pages


@pytest.mark.parametrize(
    ("spilled", "instructions", "fault"), [(0, 8, None), (4, 8, "spills: 4"), (0, 0, "no HGMMA")]
)
def test_what_is_a_fault(spilled: int, instructions: int, fault: str | None) -> None:
    case = next(c for c in aot.cases("sm_90", first_only=True) if c.name == "dz")
    found = aot.Evidence(case, "sm_90", 255, spilled, 0, instructions).fault
    assert found is fault if fault is None else found.startswith(fault)


def test_not_loading_by_tma_is_a_fault() -> None:
    case = next(c for c in aot.cases("sm_90", first_only=False) if c.constexprs.get("TMA"))
    assert aot.Evidence(case, "sm_90", 168, 0, 0, 8).fault == "does not load by TMA"
    assert aot.Evidence(case, "sm_90", 168, 0, 0, 8, 7).fault is None


def test_products_in_eight_bits_have_an_instruction_of_their_own() -> None:
    case = next(c for c in aot.cases("sm_90", first_only=True) if c.eight_bits)
    assert aot.Evidence(case, "sm_90", 255, 0, 0, 0).fault == "no QGMMA"
    for target in ("sm_80", "gfx942"):
        assert not any(c.eight_bits for c in aot.cases(target, first_only=True))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", aot.IN_THE_PAGE)
def test_every_config(target: str) -> None:
    compile_all("--target", target, "--out", str(DOCUMENT))
