"""Sums over ranks that FSDP does not do: gradients at stage 0, and the one global norm."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.parallel import ParallelDims, all_reduce_sum

_BUCKET_BYTES = 25 * 2**20


def all_reduce_coalesced(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum tensors of one dtype over the group in place, in buckets of about 25 MiB."""
    if group is None:
        return
    bucket: list[Tensor] = []
    size = 0
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        size += tensor.nbytes
        if size >= _BUCKET_BYTES or index == len(tensors) - 1:
            flat = torch.cat([member.flatten() for member in bucket])
            dist.all_reduce(flat, group=group)
            parts = flat.split([member.numel() for member in bucket])
            for member, part in zip(bucket, parts, strict=True):
                member.copy_(part.view_as(member))
            bucket, size = [], 0


def global_norm(gradients: Iterable[tuple[Tensor, bool]], dims: ParallelDims) -> float:
    """Return the 2-norm over all dense and expert gradients, equal on every rank.

    Args:
        gradients: this rank's gradients, each with whether it is an expert's. A gradient that
            several ranks hold counts once.
        dims: the layout.
    """
    total = torch.zeros((), dtype=torch.float64)
    for gradient, expert in gradients:
        copies = dims.edp if expert else dims.world_size
        if isinstance(gradient, DTensor):
            gradient, copies = gradient.to_local(), 1
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient, dtype=wide)
        total += norm.double().square().cpu() / copies
    return all_reduce_sum(total, dims.world_group).sqrt().item()
