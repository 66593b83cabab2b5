"""Which kernels are compiled ahead of time, with the argument types and sizes of training.

Ints that a model makes multiples of 16 are told to the compiler as such, as the launch does.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmoe_kernels import (
    buffers,
    capacity,
    chosen_masks,
    combine,
    dz,
    fp8,
    fp8_gemm,
    fp8_up,
    gluon_outer,
    gluon_up,
    grouped_gemm,
    latent_scores,
    mean_mask,
    routing,
    slots,
    tiles,
    up,
    wire,
)
from dmoe_kernels.configs import CANDIDATES, Config, candidates, scaled_k
from dmoe_kernels.gluon_common import HAS_GLUON, gl, register_split

# Shared memory a program may use, and whether products read both sides from it.
LIMITS = {"sm_80": (166_912, False), "sm_90": (232_448, True), "gfx942": (65_536, False)}
LIMITS |= {"sm_89": (101_376, False), "sm_100": (232_448, False), "sm_120": (101_376, False)}
_SIZES = ("size_l", "size_r", "size_m", "size_n", "size_k", "ffn_dim", "dim", "width")
_SIZES += ("latent_dim", "size_h")


@dataclass(frozen=True)
class Case:
    """One kernel with types, constants and compile options."""

    name: str
    form: str
    kernel: Any
    pointers: dict[str, str]
    """Element type of each pointer; of a descriptor for TMA with its block."""
    constexprs: dict[str, Any]
    warps: int
    stages: int
    block: str
    multiplies: bool = True
    """Whether tensor cores must be used."""
    gluon: bool = False
    """Whether it is written in Gluon."""
    eight_bits: bool = False
    """Whether they multiply e4m3."""

    def signature(self) -> dict[str, str]:
        """Return the type of each argument."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def constants(self) -> dict[tuple[int], Any]:
        """Return the constants by place."""
        names = self.kernel.arg_names
        return {(names.index(name),): value for name, value in self.constexprs.items()}

    def attributes(self, target: str) -> dict[tuple[int], Any]:
        """Return which arguments are multiples of 16, and on gfx942 which tensors are small."""
        attributes = {}
        for place, name in enumerate(self.kernel.arg_names):
            is_pointer = "[" not in self.pointers.get(name, "[")
            is_size = name in _SIZES and not self.constexprs.get("EIGHTS")
            if (is_pointer or is_size) and name not in self.constexprs:
                attributes[place,] = [["tt.divisibility", 16]]
                # A launch says so of tensors below 2 GiB; the code is another then.
                if is_pointer and target == "gfx942":
                    attributes[place,].append(["tt.pointer_range", 32])
        return attributes

    def _type(self, name: str) -> str:
        if name in self.constexprs:
            return "constexpr"
        if pointed := self.pointers.get(name):
            if "[" not in pointed:
                return f"*{pointed}"
            return f"tensordesc<{pointed}{_layout(pointed) if self.gluon else ''}>"
        return "fp32" if name in ("scale", "factor", "quantile") else "i32"


class _Numbers(NamedTuple):
    """What a product multiplies, and how."""

    dtype: str
    label: str = ""
    precision: str = "tf32"
    even_k: bool = True
    eights: bool = False
    """Whether widths are multiples of 8, but not of 16."""
    first_only: bool = True
    """Compile the default config alone."""

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2


_NUMBERS = (
    _Numbers("bf16", first_only=False),
    _Numbers("bf16", ", ragged K", even_k=False),
    _Numbers("bf16", ", in eights", eights=True),
    _Numbers("bf16", ", in eights, ragged K", even_k=False, eights=True),
    _Numbers("fp16", ", fp16"),
    _Numbers("fp32", ", fp32 by TF32", first_only=False),
    _Numbers("fp32", ", fp32", precision="ieee", first_only=False),
    _Numbers("fp32", ", fp32, ragged K", precision="ieee", even_k=False, first_only=False),
)


class _Product(NamedTuple):
    """A product in Triton, in no config yet."""

    name: str
    form: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]


def cases(target: str, *, first_only: bool) -> Iterator[Case]:
    """Yield what is compiled for a target.

    With `first_only` it is the first config of each form, in either language.
    """
    shared_memory, wgmma = LIMITS[target]
    for numbers in _NUMBERS:
        for product in _products(numbers):
            if "EVEN_K" not in product.constants and not numbers.even_k:
                continue
            fitting = candidates(
                product.name,
                numbers.itemsize,
                shared_memory,
                wgmma=wgmma,
                gluon=HAS_GLUON and not numbers.eights and (product.name, product.form) in _GLUON,
                even=(numbers.even_k and not numbers.eights) or "EVEN_K" not in product.constants,
            )
            if first_only or numbers.first_only:
                fitting = list({config.gluon: config for config in reversed(fitting)}.values())
            for config in fitting:
                case = _in_gluon if config.gluon else _in_triton
                yield case(product, config, numbers)
    if wgmma:
        yield from _fp8_products(first_only=first_only)
    for name, form, kernel, pointers, constants, warps in _others():
        block = "x".join(str(v) for k, v in constants.items() if k.startswith("BLOCK"))
        yield Case(name, form, kernel, pointers, constants, warps, 1, block, multiplies=False)
    yield from _mean_mask_products(target)


def _in_triton(product: _Product, config: Config, numbers: _Numbers) -> Case:
    name, form, kernel, pointers, constants = product
    block_m, block_n, block_k = config.block_m, config.block_n, scaled_k(config, numbers.itemsize)
    if constants.get("GATHER_A"):
        block_m, block_n = block_n, block_m
    form += numbers.label
    if config.tma:
        form = f"{form}, TMA"
        blocks = {"a": (block_m, block_k), "w": (1, block_n, block_k)}
        if constants.get("ACTIVATION") == "swiglu":
            blocks["w"] = (2, block_n // 2, block_k)
        elif constants.get("TRANSPOSED") is False:
            blocks["w"] = (1, block_k, block_n)
        if name == "up":
            del blocks["a"]
        elif name != "gemm":
            by_tma, columns = ("b", block_n) if constants["GATHER_A"] else ("a", block_m)
            blocks = {by_tma: (block_k, columns)}
        described = {
            arg: f"{numbers.dtype}[{','.join(map(str, block))}]" for arg, block in blocks.items()
        }
        pointers = pointers | described
    constants = constants | {"EIGHTS": numbers.eights}
    constants |= {} if name == "dz" else {"TMA": config.tma}
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return Case(
        name,
        form,
        kernel,
        pointers,
        constants | sizes | {"PRECISION": numbers.precision, "GROUP_M": config.group_m},
        config.warps,
        config.stages,
        f"{block_m}x{block_n}x{block_k}",
        multiplies=numbers.precision != "ieee",
    )


def _layout(block: str) -> str:
    """Return how Gluon lays a block out in shared memory."""
    dtype, sizes = block[:-1].split("[")
    element = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}[dtype]
    shape = [int(size) for size in sizes.split(",")]
    return f",{gl.NVMMASharedLayout.get_default_for(shape, element)!r}"


_GATED = {"x": "T", "w_rows": "T[128,64]", "index": "i64", "weights": "fp32"}
_GLUON: dict[tuple[str, str], dict[str, str]] = {
    ("up", "swiglu"): _GATED | {"a": "T", "a_rows": "T[64,128]"},
    ("gemm", "down"): {"x_rows": "T[64,64]", "w_rows": "T[128,64]"},
    ("gemm", "dx"): {"x_rows": "T[64,64]", "w_rows": "T[64,256]"},
    ("outer", "dw_down"): {"gathered": "T"},
    ("outer", "dw_up"): {"gathered": "T"},
    ("outer", "dw_down to fp32"): {"gathered": "T"},
    ("outer", "dw_up to fp32"): {"gathered": "T"},
}
"""Forms in Gluon, with the pointers that differ; T is the dtype that is multiplied."""


def _in_gluon(product: _Product, config: Config, numbers: _Numbers) -> Case:
    name, form, constants = product.name, product.form, product.constants
    mine = dict(_GLUON[name, form])
    if name == "outer":
        kernel, out = gluon_outer.outer_kernel, product.pointers["out"]
        gather_a = constants["GATHER_A"]
        left_is_a = gluon_outer.left_side_is_a(config, gather_a)
        gather_left, groups = left_is_a == gather_a, config.block_m // 64
        mine |= {"in_order": f"T[64,{256 if gather_left else 64}]", "index": "i64"}
        stored = ["64", "64" if out == "fp32" else "128"]
        mine |= {"out_rows": f"{out}[{','.join(stored if left_is_a else stored[::-1])}]"}
        mine |= {"offsets": "i32"}
        chosen = {"GATHER_LEFT": gather_left, "LEFT_IS_A": left_is_a, "GROUPS": groups}
        chosen |= {"STAGES": config.stages, "GROUP_SIZE": config.group_m}
        warps, registers = gluon_outer.LOAD_WARPS, gluon_outer.load_registers(config)
        chosen |= {"LOAD_WARPS": warps, "LOAD_REGISTERS": registers}
        chosen |= {"MULTIPLY_REGISTERS": register_split(groups, warps, registers)}
    else:
        kernel = gluon_up.forward_kernel
        mine |= {"z": "T", "z_rows": "T[64,128]", "table": "i32", "offsets": "i32"}
        load_warps = 4 if name == "up" else 1
        split = register_split(2, load_warps, gluon_up.LOAD_REGISTERS)
        chosen = {"TRANSPOSED": constants.get("TRANSPOSED", True), "STAGES": config.stages}
        chosen |= {"GROUP_M": config.group_m, "LOAD_WARPS": load_warps}
        chosen |= {"LOAD_REGISTERS": gluon_up.LOAD_REGISTERS, "MULTIPLY_REGISTERS": split}
        absent = {"x", "x_rows", "index", "weights", "a", "a_rows"} - mine.keys()
        chosen |= dict.fromkeys(absent)
    return Case(
        name,
        f"{form}{numbers.label}, Gluon",
        kernel,
        {key: value.replace("T", numbers.dtype) for key, value in mine.items()},
        chosen,
        config.warps,
        config.stages,
        f"{config.block_m}x{config.block_n}x{config.block_k}",
        gluon=True,
    )


_TILES = {"index": "i64", "table": "i32", "offsets": "i32"}


def _products(numbers: _Numbers) -> Iterator[_Product]:
    """Yield the products of matrices, forward and backward."""
    rows = dict.fromkeys(("x", "w", "z", "a"), numbers.dtype) | {"weights": "fp32"} | _TILES
    for activation in ("swiglu", "gelu", "relu"):
        constants = {"ACTIVATION": activation, "EVEN_K": numbers.even_k}
        yield _Product("up", activation, up.up_kernel, rows, constants)
    gemm = dict.fromkeys(("a", "w", "y"), numbers.dtype) | _TILES
    for form, transposed in (("down", True), ("dx", False)):
        constants = {"TRANSPOSED": transposed, "EVEN_K": numbers.even_k}
        yield _Product("gemm", form, grouped_gemm.gemm_kernel, gemm, constants)
    back = dict.fromkeys(("dy", "w", "z", "dz_", "a"), numbers.dtype) | _TILES
    back |= {"weights": "fp32", "parts": "fp32"}
    for activation in ("swiglu", "gelu", "relu"):
        constants = {"ACTIVATION": activation, "EVEN_K": numbers.even_k}
        yield _Product("dz", activation, dz.dz_kernel, back, constants)
    outer = {"a": numbers.dtype, "b": numbers.dtype, "offsets": "i32", "index": "i64"}
    for name, form, gather_a, out in (
        ("outer", "dw_down", True, numbers.dtype),
        ("outer", "dw_up", False, numbers.dtype),
        ("outer", "dw_down to fp32", True, "fp32"),
        ("outer", "dw_up to fp32", False, "fp32"),
        ("outer_add", "dw_down, fp32", True, "fp32"),
        ("outer_add", "dw_up, fp32", False, "fp32"),
    ):
        if form.endswith(" to fp32") and numbers.itemsize == 4:
            continue
        constants = {"GATHER_A": gather_a, "ACCUMULATE": name == "outer_add"}
        yield _Product(name, form, grouped_gemm.outer_kernel, outer | {"out": out}, constants)


def _fp8_products(*, first_only: bool) -> Iterator[Case]:
    """Yield the products in eight bits, which only sm_90 has."""
    scales = {"scales": "fp32", "a_scales": "fp32", "w_scales": "fp32", "x_scales": "fp32"}
    numbers = {"x": "fp8e4nv", "a": "fp8e4nv", "w": "fp8e4nv[128,128]", "numbers": "fp8e4nv"}
    forms = [("up_fp8", a, fp8_up.up_kernel, {"ACTIVATION": a}) for a in ("swiglu", "gelu", "relu")]
    forms.append(("gemm_fp8", "down, dx", fp8_gemm.gemm_kernel, {}))
    for rows, label, itemsize in (("bf16", "", 2), ("fp16", ", fp16", 2), ("fp32", ", fp32", 4)):
        pointers = numbers | scales | _TILES | {"y": rows, "z": rows, "weights": "fp32"}
        for name, form, kernel, constants in forms:
            configs = CANDIDATES[fp8_up.kernel_for(itemsize) if name == "up_fp8" else name]
            for config in configs[: 1 if first_only or rows != "bf16" else None]:
                sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
                yield Case(
                    name,
                    form + label,
                    kernel,
                    pointers,
                    constants | sizes | {"GROUP_M": config.group_m},
                    config.warps,
                    config.stages,
                    f"{config.block_m}x{config.block_n}x{fp8.BLOCK.value}",
                    eight_bits=True,
                )
    quantize = numbers | scales | {"x": "bf16", "w": "bf16"}
    for form, kernel, constants, warps in (
        ("rows", fp8.quantize_rows_kernel, {"BLOCKS": 32}, 4),
        ("weights", fp8.quantize_weights_kernel, {"TRANSPOSED": False}, 8),
        ("weights, turned", fp8.quantize_weights_kernel, {"TRANSPOSED": True}, 8),
    ):
        yield Case("fp8", form, kernel, quantize, constants, warps, 1, "128", multiplies=False)


def _others() -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], int]]:
    """Yield name, form, kernel, pointers, constants and warps of the kernels that do not."""
    pointers = {"counts": "i64", "table": "i32", "offsets": "i32"}
    constants = {"BLOCK_M": 128, "BLOCK_E": 128}
    yield "tiles", "128 experts", tiles.tile_table_kernel, pointers, constants, 4
    for dtype in ("bf16", "fp32"):
        pointers = {"y": dtype, "x": dtype, "by_source": "i64", "offsets": "i64"}
        constants = {"BLOCK_J": 8, "BLOCK_D": 1024}
        yield "combine", f"dim 2048, {dtype}", combine.gather_sum_kernel, pointers, constants, 4
    yield from _routing()
    yield from _slots()
    yield from _wire()
    yield from _mean_mask()


def _routing() -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], int]]:
    floats = ("logits", "bias", "scores_out", "weights", "dscores", "dweights", "dlogits")
    pointers = dict.fromkeys(floats, "fp32") | {"ids": "i64", "k_of_token": "i64", "valid": "u8"}
    experts, top_k = 128, 8
    block_t, block_e = routing.blocks(experts)
    for score in ("softmax", "sigmoid"):
        sizes = {"SCORE": score, "BLOCK_T": block_t, "BLOCK_E": block_e}
        form = f"{score}, {experts} experts"
        flags = dict.fromkeys(("HAS_BIAS", "HAS_K", "HAS_VALID"), True)
        yield "select", form, routing.select_kernel, pointers, flags | sizes, 4
        for over_choice, normalize in itertools.product((False, True), repeat=2):
            if over_choice and score == "sigmoid":
                continue
            gates = {"OVER_CHOICE": over_choice, "NORMALIZE": normalize}
            gates |= sizes | {"BLOCK_K": top_k}
            of = f"{form}, k {top_k}{', over choice' * over_choice}{', normalised' * normalize}"
            yield "weigh", of, routing.weigh_kernel, pointers, gates, 4
            for given in ("both", "scores", "weights"):
                has = {"HAS_DSCORES": given != "weights", "HAS_DWEIGHTS": given != "scores"}
                kernel, name = routing.weigh_backward_kernel, f"{of}, backward of {given}"
                yield "weigh", name, kernel, pointers, gates | has, 4


def _slots() -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], int]]:
    pointers = dict.fromkeys(("ids", "starts", "slots", "index", "by_token", "offsets"), "i64")
    pointers["counts"] = "i32"
    constants = {"BLOCK": slots.BLOCK, "BLOCK_E": 256}
    yield "slots", "count, 128 experts", slots.count_kernel, pointers, constants, 4
    totals = {"counts": "i32", "totals": "i64"}
    yield "slots", "scan", slots.scan_kernel, totals, {"BLOCK_P": 1024}, 4
    starts = {"counts": "i64", "starts": "i64"}
    yield "slots", "starts, 128 experts", slots.starts_kernel, starts, {"BLOCK_E": 256}, 4
    constants = {"BLOCK": slots.BLOCK, "CHUNK": 16}
    yield "slots", "place", slots.place_kernel, pointers, constants, 4
    pointers = {"x": "bf16", "tokens": "i64", "out": "bf16"}
    yield "buffers", "dim 2048", buffers.fill_kernel, pointers, {"BLOCK_D": 1024}, 4
    pointers = {"ids": "i64", "counts": "i32", "positions": "i32"}
    yield "capacity", "position", capacity.position_kernel, pointers, constants, 4


def _wire() -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], int]]:
    pointers = {"x": "bf16", "wire": "u8", "by_source": "i64", "offsets": "i64"}
    sizes = {"BLOCKS": 16}
    for form, has_map in (("quantize", True), ("quantize, no map", False)):
        constants = {"HAS_MAP": has_map} | sizes
        yield "wire", f"{form}, dim 2048", wire.quantize_kernel, pointers, constants, 4
    yield "wire", "dequantize, dim 2048", wire.dequantize_kernel, pointers, sizes, 4


def _mean_mask() -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], int]]:
    pointers = {"scores": "fp32", "bits": "u8", "passes": "i32", "valid": "u8"}
    pointers |= dict.fromkeys(("hidden", "a"), "bf16")
    for activation, width in itertools.product(("none", "swiglu", "gelu", "relu"), (3072, 8192)):
        constants = {"ACTIVATION": activation, "HARD": activation in ("none", "relu")}
        constants |= {"HAS_VALID": activation in ("swiglu", "relu"), "COUNT_PASSES": False}
        sizes, warps = chosen_masks.blocks(width)
        form = f"{activation}, {width} neurons"
        yield "choose", form, chosen_masks.choose_kernel, pointers, constants | sizes, warps


def _mean_mask_products(target: str) -> Iterator[Case]:
    """Yield the cases of the kernels that compute scores."""
    pointers = dict.fromkeys(("z", "w", "scores", "dscores"), "fp32") | {"bits": "u8"}
    pointers |= dict.fromkeys(("hidden", "a", "da", "dhidden"), "bf16")
    forms = [("scores", "float32", latent_scores.scores_kernel, {}, latent_scores.SCORES)]
    for activation, hard in itertools.product(("swiglu", "gelu", "relu"), (False, True)):
        constants = {"ACTIVATION": activation, "HARD": hard}
        for direction, kernel in (
            ("", mean_mask.forward_kernel),
            (", backward", mean_mask.backward_kernel),
        ):
            form = f"{activation}, {'hard' if hard else 'soft'}{direction}"
            forms.append(("mean_mask", form, kernel, constants, mean_mask.TILE))
    for name, form, kernel, constants, tile in forms:
        blocks = {key: size for key, size in tile.items() if key.startswith("BLOCK")}
        constants = constants | blocks | {"PRECISION": "ieee" if target == "gfx942" else "tf32x3"}
        yield Case(
            name,
            form,
            kernel,
            pointers,
            constants,
            tile["num_warps"],
            tile["num_stages"],
            "x".join(map(str, blocks.values())),
            multiplies=not constants.get("HARD"),
        )
