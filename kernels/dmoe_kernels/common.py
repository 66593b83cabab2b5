"""What all kernels share: the interpreter's corrections, activations, grid sizes, tile order."""

import functools

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, on the CPU; read when this package is imported."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b, accumulated in float32."""
    if INTERPRET:
        # The interpreter multiplies the bits of bfloat16 as integers, and says nothing.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 `x` in `dtype`, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter would cut the lower bits off.
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


def by_eights(*sizes: int) -> bool:
    """Say whether 8 divides all widths but 16 not all, so that kernels must be told: `in_eights`.

    What the launch tells the compiler of a width is whether 16 divides it. Without knowing that of
    a row's stride, a tile is loaded and stored number by number.
    """
    return all(size % 8 == 0 for size in sizes) and any(size % 16 for size in sizes)


@triton.jit
def in_eights(size, EIGHTS: tl.constexpr):
    """Return a width; the compiler then knows that 8 divides it, if EIGHTS."""
    if EIGHTS:
        size = size // 8 * 8
    return size


@triton.jit
def tanh(x):
    """Return tanh of float32 `x`."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def gelu_tanh(x):
    """Return gelu(x) in its tanh form, and its derivative."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    t = tanh(inner)
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


@triton.jit
def ordered(x):
    """Return integers that order as the floats do, with -0.0 equal to 0.0."""
    # The lower bits of negative ones are flipped.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return ((bits >> 31) & 0x7FFFFFFF) ^ bits


@triton.jit
def swiglu(gate, up_):
    """Return silu(gate) up_, of float32 numbers."""
    return gate * tl.sigmoid(gate) * up_


@triton.jit
def ungated(x, ACTIVATION: tl.constexpr):
    """Return gelu(x) or relu(x), and its derivative."""
    if ACTIVATION == "gelu":
        hidden, slope = gelu_tanh(x)
    else:
        hidden, slope = tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    return hidden, slope


@triton.jit
def swizzled(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return the place (m, n) of a tile: GROUP_M rows of tiles share a block of weights in L2."""
    width = GROUP_M * num_n
    first = tile // width * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    local = tile % width
    return first + local % size, local // size


def precision_of(dtype: torch.dtype) -> str:
    """Return how products of `dtype` are computed; float32 follows torch's matmul precision."""
    wide = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if wide else "tf32"


def num_programs(device: torch.device, most: int) -> int:
    """Return how many programs a persistent kernel starts: one a multiprocessor, `most` at most."""
    if INTERPRET.value:
        return max(1, min(3, most))
    return max(1, min(_multiprocessors(device), most))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
