"""The gradients of a step: sums over ranks that FSDP does not do, the one global norm, scaling."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.models.decoder import is_expert
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


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what scales gradients of a norm down to `max_norm` (0: nothing does)."""
    return max_norm / norm if max_norm and norm > max_norm else 1.0


@dataclass(frozen=True)
class Gradients:
    """This rank's gradients, as plain local tensors by how many ranks hold the same ones."""

    by_copies: dict[int, list[Tensor]]
    dims: ParallelDims

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, Tensor]], dims: ParallelDims) -> "Gradients":
        """Collect the gradients of named parameters, sharded or not.

        Args:
            parameters: each with its gradient.
            dims: the layout.
        """
        by_copies: dict[int, list[Tensor]] = {}
        for name, parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None, f"{name} has no gradient"
            copies = dims.edp if is_expert(name) else dims.world_size
            if isinstance(gradient, DTensor):
                gradient, copies = gradient.to_local(), 1
            by_copies.setdefault(copies, []).append(gradient)
        return cls(by_copies, dims)

    def global_norm(self) -> float:
        """Return the 2-norm over all ranks, in which a gradient that several hold counts once."""
        total: Tensor | float = 0.0
        for copies, tensors in self.by_copies.items():
            norms = torch.stack(torch._foreach_norm(tensors)).double()
            total = total + norms.square().sum() / copies
        assert isinstance(total, Tensor)
        return all_reduce_sum(total, self.dims.world_group).sqrt().item()

    def scale(self, factor: float) -> None:
        """Multiply every gradient in place."""
        if factor == 1:
            return
        for tensors in self.by_copies.values():
            torch._foreach_mul_(tensors, factor)
