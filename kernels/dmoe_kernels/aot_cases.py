"""Which kernels are compiled ahead of time, with the argument types and sizes of training.

Ints that a model makes multiples of 16 are told to the compiler as such, as the launch does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dmoe_kernels import dz, grouped_gemm, up
from dmoe_kernels.configs import Config, candidates, scaled_k

# Shared memory a program may use, and whether products read both sides from it.
_LIMITS = {"sm_80": (166_912, False), "sm_90": (232_448, True), "gfx942": (65_536, False)}
_SIZES = ("size_m", "size_n", "size_k", "ffn_dim", "dim")


@dataclass(frozen=True)
class Case:
    """One kernel with types, constants and compile options."""

    name: str
    form: str
    kernel: Any
    pointers: dict[str, str]
    """Element type of each pointer."""
    constexprs: dict[str, Any]
    warps: int
    stages: int
    block: str
    multiplies: bool = True
    """Whether tensor cores must be used."""
    floats: tuple[str, ...] = field(default=())
    """Arguments that are float32 numbers."""

    def signature(self) -> dict[str, str]:
        """Return the type of each argument."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def constants(self) -> dict[tuple[int], Any]:
        """Return the constants by place."""
        names = self.kernel.arg_names
        return {(names.index(name),): value for name, value in self.constexprs.items()}

    def attributes(self) -> dict[tuple[int], Any]:
        """Return which arguments are multiples of 16."""
        return {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(self.kernel.arg_names)
            if name in self.pointers or name in _SIZES
        }

    def _type(self, name: str) -> str:
        if name in self.constexprs:
            return "constexpr"
        if name in self.pointers:
            return f"*{self.pointers[name]}"
        return "fp32" if name in self.floats else "i32"


def cases(target: str, *, first_only: bool) -> Iterator[Case]:
    """Yield what is compiled for a target; with `first_only` the default config of each form."""
    shared_memory, wgmma = _LIMITS[target]
    for name, form, kernel, pointers, constants in _products():
        fitting = candidates(name, 2, shared_memory, wgmma)
        for config in fitting[:1] if first_only else fitting:
            yield _product(name, form, kernel, pointers, constants, config)


def _product(
    name: str,
    form: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    config: Config,
) -> Case:
    block_k = scaled_k(config, 2)
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": block_k}
    return Case(
        name,
        form,
        kernel,
        pointers,
        constants | sizes | {"PRECISION": "tf32", "GROUP_M": config.group_m},
        config.warps,
        config.stages,
        f"{config.block_m}x{config.block_n}x{block_k}",
    )


_TILES = {"index": "i64", "table": "i32", "offsets": "i32"}


def _products() -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any]]]:
    """Yield name, form, kernel, pointers and constants of the kernels that multiply matrices."""
    rows = dict.fromkeys(("x", "w", "z", "a"), "bf16") | {"weights": "fp32"} | _TILES
    for activation in ("swiglu", "gelu", "relu"):
        constants = {"ACTIVATION": activation, "EVEN_K": True}
        yield "up", activation, up.up_kernel, rows, constants
    gemm = dict.fromkeys(("a", "w", "y"), "bf16") | _TILES
    for form, gather, transposed in (("down", False, True), ("dx", False, False)):
        constants = {"GATHER": gather, "TRANSPOSED": transposed, "EVEN_K": True}
        yield "gemm", form, grouped_gemm.gemm_kernel, gemm, constants
    back = dict.fromkeys(("dy", "w", "z", "dz_", "a"), "bf16") | _TILES
    back |= {"weights": "fp32", "parts": "fp32"}
    for activation in ("swiglu", "gelu", "relu"):
        constants = {"ACTIVATION": activation, "EVEN_K": True}
        yield "dz", activation, dz.dz_kernel, back, constants
    outer = {"a": "bf16", "b": "bf16", "offsets": "i32", "a_index": "i64", "b_index": "i64"}
    for name, form, a_gather, out in (
        ("outer", "dw_down", True, "bf16"),
        ("outer", "dw_up", False, "bf16"),
        ("outer_add", "dw_up, fp32", False, "fp32"),
    ):
        constants = {"A_GATHER": a_gather, "B_GATHER": not a_gather}
        constants |= {"ACCUMULATE": name == "outer_add"}
        yield name, form, grouped_gemm.outer_kernel, outer | {"out": out}, constants
