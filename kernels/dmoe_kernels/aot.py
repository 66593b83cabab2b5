"""Compile every kernel ahead of time, without a GPU, and read what the compiler made of it.

    python -m dmoe_kernels.aot --out docs/results/kernels_aot.md [KERNEL ...]
    python -m dmoe_kernels.aot --target sm_100

A config that spills registers, lacks the tensor-core instruction of its target, or was to load by
TMA and does not, is a fault: the command ends with 1. Triton's own ptxas and cuobjdump do the work.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmoe_kernels.aot_cases import LIMITS, Case, cases

TARGETS = {
    name: GPUTarget("cuda", int(name[3:]), 32)
    for name in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
IN_THE_PAGE = ("sm_80", "sm_90", "gfx942")
"""Compiled for if none is named. For the others no tile shapes were chosen, so a few spill."""
HEAD = """# Kernels, compiled ahead of time

<!-- Written by `make test-slow` and by `python -m dmoe_kernels.aot`: do not edit. -->

Compiled without a GPU, for element types and sizes of training. Registers are those of a thread,
shared memory that of a program, spills the loads and stores of registers that did not fit; the last
column counts tensor-core instructions. A block is M x N x K. Nothing here says how fast a kernel
is.
"""
TENSOR_CORE = {"sm_90": "HGMMA", "gfx942": "v_mfma"}
TENSOR_CORE |= dict.fromkeys(("sm_80", "sm_89", "sm_100", "sm_120"), "HMMA")
EIGHT_BITS = "QGMMA"
"""The instruction for e4m3, on sm_90."""


class Evidence(NamedTuple):
    """What one kernel became on one target."""

    case: Case
    target: str
    registers: int
    """A thread; on gfx942 vector registers."""
    spilled: int
    """Loads and stores of registers that did not fit, in the machine code."""
    shared: int
    """Bytes of shared memory a program."""
    tensor_core: int
    """Tensor-core instructions in the machine code."""
    by_tma: int = 0
    """Loads by TMA in the machine code."""

    @property
    def fault(self) -> str | None:
        """Say what is wrong, or None."""
        if self.spilled:
            return f"spills: {self.spilled} loads and stores"
        if self.shared > LIMITS[self.target][0]:
            return f"more shared memory than the {LIMITS[self.target][0]} bytes there are"
        if self.case.multiplies and not self.tensor_core:
            return f"no {_instruction(self.case, self.target)}"
        if (self.case.gluon or self.case.constexprs.get("TMA")) and not self.by_tma:
            return "does not load by TMA"
        return None


def compile_case(case: Case, target: str) -> Evidence:
    """Compile for a target and read registers, spills, shared memory and instructions."""
    source = ASTSource
    if case.gluon:
        from triton.experimental.gluon import _runtime

        source = _runtime.GluonASTSource
    compiled = triton.compile(
        source(case.kernel, case.signature(), case.constants(), case.attributes(target)),
        target=TARGETS[target],
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    shared = compiled.metadata.shared
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spilled = sum(map(int, re.findall(r"\.[vs]gpr_spill_count: +(\d+)", assembly)))
        [registers] = map(int, re.findall(r"\.vgpr_count: +(\d+)", assembly))
        return Evidence(case, target, registers, spilled, shared, assembly.count("v_mfma"))
    usage, machine_code = _inspect(compiled.asm["cubin"])
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    spilled = len(re.findall(r"\b(?:LDL|STL)\b", machine_code))
    multiply, load = (
        len(re.findall(rf"\b(?:UTC)?{name}\b", machine_code))  # sm_100 has UTCHMMA
        for name in (_instruction(case, target), "UTMALDG")
    )
    return Evidence(case, target, registers, spilled, shared, multiply, load)


def evidence(names: list[str], targets: list[str], *, first_only: bool) -> Iterator[Evidence]:
    """Compile the cases of the named kernels, or of all if none is named, for the targets."""
    for target in targets:
        for case in cases(target, first_only=first_only):
            if not names or case.name in names:
                yield compile_case(case, target)


def section(target: str, rows: list[Evidence]) -> str:
    """Return the table of a target."""
    lines = [
        f"## Triton {triton.__version__}, {target}",
        "",
        "| kernel | form | block | warps | stages | registers | spills | shared bytes "
        f"| {TENSOR_CORE[target]}{f' or {EIGHT_BITS}' if target == 'sm_90' else ''} |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        case = row.case
        lines.append(
            f"| {case.name} | {case.form} | {case.block} | {case.warps} | {case.stages} "
            f"| {row.registers} | {row.spilled} | {row.shared} | {row.tensor_core} |"
        )
    return "\n".join(lines) + "\n"


def write(path: Path, rows: list[Evidence]) -> None:
    """Put the tables of these rows into the document; those of other releases and targets stay."""
    text = path.read_text() if path.exists() else ""
    old = re.findall(r"^## .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    tables = {part.splitlines()[0]: part.strip() + "\n" for part in old}
    for target in TARGETS:
        if of_target := [row for row in rows if row.target == target]:
            part = section(target, of_target)
            tables[part.splitlines()[0]] = part
    path.write_text("\n".join([HEAD, *(tables[name] for name in sorted(tables))]))


def _instruction(case: Case, target: str) -> str:
    return EIGHT_BITS if case.eight_bits else TENSOR_CORE[target]


def _inspect(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the machine code of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tools = triton.knobs.nvidia
        usage = _run([tools.cuobjdump.path, "-res-usage", str(path)])
        return usage, _run([tools.cuobjdump.path, "-sass", str(path)])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="kernels; all if none is given")
    parser.add_argument(
        "--target", choices=TARGETS, action="append", help=f"{', '.join(IN_THE_PAGE)} if not given"
    )
    parser.add_argument("--first", action="store_true", help="the default config of each alone")
    parser.add_argument("--out", type=Path, help="the document to write")
    options = parser.parse_args()
    rows: list[Evidence] = []
    for row in evidence(
        options.names, options.target or list(IN_THE_PAGE), first_only=options.first
    ):
        rows.append(row)
        print(
            f"{row.case.name:8} {row.case.form:24} {row.case.block:12} w{row.case.warps} "
            f"s{row.case.stages} {row.target:6} {row.registers:4} registers {row.spilled:4} spills "
            f"{row.shared:7} bytes {row.tensor_core:4} {row.fault or ''}",
            flush=True,
        )
    if options.out:
        write(options.out, rows)
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
