"""Tensor descriptors for TMA, the copy engine of sm_90: made on the host, a block each.

Triton 3.6 can also give loading and multiplying warps of their own where all comes by TMA. It is
not asked to: on an H100 such a product was wrong (relative error 0.7), and another one never ended.
"""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def suits_tma(*tensors: Tensor) -> bool:
    """Say whether TMA can read these: none is empty, and rows begin at multiples of 16 bytes."""
    return all(
        t.numel() > 0 and t.data_ptr() % 16 == 0 and t.shape[-1] * t.itemsize % 16 == 0
        for t in tensors
    )


def descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a descriptor of a contiguous tensor; what a block has beyond its edges reads as zero.

    Raises:
        RuntimeError: TMA cannot read it.
    """
    if not suits_tma(tensor):
        raise RuntimeError(f"TMA cannot read rows of {tensor.shape[-1]} {tensor.dtype}")
    return TensorDescriptor.from_tensor(tensor, block)


def rows_descriptor(a_RK: Tensor, block_m: int, block_k: int) -> TensorDescriptor:
    """Return a descriptor of rows that lie one after the other."""
    return descriptor(a_RK, [block_m, block_k])


def matrix_descriptor(
    w: Tensor, block_n: int, block_k: int, *, transposed: bool, parts: int = 1
) -> TensorDescriptor:
    """Return a descriptor of all experts' matrices, as `product` reads them.

    Args:
        w: (E, parts N, K) if `transposed`, else (E, K, N).
        block_n: columns of a tile, of all parts together.
        block_k: summed in a step.
        transposed: which dim is summed.
        parts: into how many the columns are cut.
    """
    if not transposed:
        return descriptor(w, [1, block_k, block_n])
    in_parts: torch.Tensor = w.view(len(w) * parts, w.shape[1] // parts, w.shape[2])
    return descriptor(in_parts, [parts, block_n // parts, block_k])
