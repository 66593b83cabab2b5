"""What a rank holds of the parameters that DeepSpeed's ZeRO optimizers have cut up.

DeepSpeed 0.19 flattens parameters and gives each rank a range of their elements: of a whole group
at once (stages 1 and 2, and the optimizer of its own that bfloat16 has at stage 1), or of each
parameter by itself (stage 3). A checkpoint holds them by rows under their global shapes, so ranks
exchange elements when it is saved or loaded.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dmoe.parallel import ParallelDims, all_to_all_rows

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Place(NamedTuple):
    """Where a rank keeps its range of one parameter."""

    flat: int
    """Number of the flat tensor."""
    offset: int
    """Of the first element in it."""
    elements: range
    """Of the flattened parameter."""


class Partitions:
    """The ranges of this rank in float32, with their moments; the ranks must call in step.

    Args:
        optimizer: DeepSpeed's, for any stage.
        parameters: by global name, with the shapes that they have when whole.
        dims: the layout.
        device: on which the ranks exchange.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, tuple[Tensor, torch.Size]],
        dims: ParallelDims,
        device: torch.device,
    ):
        self._optimizer, self._dims, self._device = optimizer, dims, device
        self._shapes = {name: shape for name, (_, shape) in parameters.items()}
        self._is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self._flats = _flat_tensors(optimizer)
        _check_group(optimizer, dims)
        self._places = {
            name: self._find(parameter, shape.numel())
            for name, (parameter, shape) in parameters.items()
        }
        self._ranges = self._ranges_of_all_ranks()
        self._mesh = dims.dense_mesh
        if self._mesh is not None and device.type != "cpu":
            # Whole rows of everything would be a burden on a GPU that is full already.
            self._mesh = DeviceMesh("cpu", torch.arange(dims.world_size))
        for number, flat in enumerate(self._flats):
            # In place before the first step, so that they can be saved and loaded.
            with self._at_hand(number):
                optimizer.optimizer.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS},
                }

    @property
    def steps(self) -> list[Tensor]:
        """The number of steps taken, once for each flat tensor; live."""
        return [self._optimizer.optimizer.state[flat]["step"] for flat in self._flats]

    def norm(self) -> float:
        """Return the 2-norm of the reduced gradients over all ranks; inf where it is not finite."""
        optimizer = self._optimizer
        if self._is_stage_3:
            norms = optimizer._get_norm_groups()
        elif hasattr(optimizer, "get_grads_for_norm"):
            norms = torch._foreach_norm(optimizer.get_grads_for_norm()[0])
        else:
            norms = [optimizer.scaled_global_norm()]
        norms = torch.stack([norm.double() for norm in norms])
        # DeepSpeed puts -1 in the place of what is not finite.
        return torch.where(norms < 0, math.inf, norms).norm().item()

    def fill_masters(self, whole: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Set this rank's ranges of the float32 weights from whole parameters.

        Raises:
            AssertionError: one is not what DeepSpeed has there, but for the rounding to `dtype`.
        """
        for name in self._one_after_the_other():
            elements = self._places[name].elements
            values = whole[name].flatten()[elements.start : elements.stop]
            master = self._pieces(name)[0]
            assert torch.equal(master, values.to(dtype).to(master)), (
                f"DeepSpeed holds something else than the elements {elements} of {name} on rank "
                f"{self._dims.rank}"
            )
            master.copy_(values)

    @torch.no_grad()
    def to_rows(self) -> dict[str, Tensor]:
        """Return weights and moments in host memory under global names, each rank with its rows."""
        state: dict[str, Tensor] = {}
        for name in self._one_after_the_other():
            shape = self._shapes[name]
            counts_sent, counts_received = self._counts(name)
            pieces = torch.stack(self._pieces(name), dim=1).to(self._device)
            rows = all_to_all_rows(pieces, counts_sent, counts_received, self._dims.world_group)
            for key, column in zip(_names(name), rows.cpu().unbind(1), strict=True):
                state[key] = self._global(column.reshape(-1, *shape[1:]), shape)
        return state

    @torch.no_grad()
    def from_rows(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `to_rows` returned, and let the weights that compute follow."""
        for name in self._one_after_the_other():
            counts_received, counts_sent = self._counts(name)
            locals_ = [
                value.to_local() if isinstance(value, DTensor) else value
                for value in (state[key] for key in _names(name))
            ]
            rows = torch.stack([local.flatten() for local in locals_], dim=1).to(self._device)
            pieces = all_to_all_rows(rows, counts_sent, counts_received, self._dims.world_group)
            for piece, column in zip(self._pieces(name), pieces.unbind(1), strict=True):
                piece.copy_(column)
        self._refresh()

    def _refresh(self) -> None:
        """Let the weights that compute follow the float32 ones."""
        optimizer = self._optimizer
        if not self._is_stage_3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for number in range(len(self._flats)):
            with self._at_hand(number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        # Small parameters stay whole on every rank.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _one_after_the_other(self) -> Iterator[str]:
        """Yield all names, each while its weights and moments are in memory, alike on all ranks."""
        if not self._is_stage_3:
            yield from self._places
            return
        for number in range(len(self._flats)):
            with self._at_hand(number):
                yield from (name for name, place in self._places.items() if place.flat == number)

    @contextmanager
    def _at_hand(self, number: int) -> Iterator[None]:
        """Bring a flat tensor and its moments from NVMe, and write them back, if they lie there."""
        optimizer = self._optimizer
        on_disk = self._is_stage_3 and optimizer._swappable_optimizer_subgroup(number)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_out(number)

    def _find(self, parameter: Any, size: int) -> _Place:
        if self._is_stage_3:
            flat, offset, length = self._optimizer.grad_position[
                self._optimizer.get_param_id(parameter)
            ]
            # All ranges are of one length; the last ones may reach beyond the end.
            start = min(self._dims.rank * length, size)
            return _Place(flat, offset, range(start, min(start + length, size)))
        mapping = parameter._hp_mapping
        if mapping is None:
            return _Place(0, 0, range(0))
        start = mapping.lp_fragment_address.start
        elements = range(start, start + mapping.lp_fragment_address.numel)
        return _Place(mapping.param_group_index, mapping.hp_fragment_address.start, elements)

    def _pieces(self, name: str) -> list[Tensor]:
        """Return this rank's range of a weight and of its two moments, live."""
        place = self._places[name]
        flat = self._flats[place.flat]
        moments = self._optimizer.optimizer.state[flat]
        return [
            tensor.detach().narrow(0, place.offset, len(place.elements))
            for tensor in (flat, *(moments[key] for key in MOMENTS))
        ]

    def _ranges_of_all_ranks(self) -> dict[str, list[range]]:
        ends = [(place.elements.start, place.elements.stop) for place in self._places.values()]
        own = torch.tensor(ends, dtype=torch.int64)
        every = [own]
        if self._dims.world_group is not None:
            every = [torch.empty_like(own) for _ in range(self._dims.world_size)]
            dist.all_gather(every, own, group=self._dims.world_group)
        of_ranks = [ends_of_rank.tolist() for ends_of_rank in every]
        return {
            name: [range(*ends_of_rank[number]) for ends_of_rank in of_ranks]
            for number, name in enumerate(self._places)
        }

    def _counts(self, name: str) -> tuple[list[int], list[int]]:
        """Return the elements sent to each rank, and received from it, to have rows of one's own.

        Ranges and rows are both in the order of the ranks.
        """
        shape, rank, ranges = self._shapes[name], self._dims.rank, self._ranges[name]
        num_ranks = self._dims.world_size
        chunk = -(-shape[0] // num_ranks) * math.prod(shape[1:])
        rows = [
            range(min(other * chunk, shape.numel()), min((other + 1) * chunk, shape.numel()))
            for other in range(num_ranks)
        ]
        sent = [_overlap(ranges[rank], rows[other]) for other in range(num_ranks)]
        received = [_overlap(ranges[other], rows[rank]) for other in range(num_ranks)]
        return sent, received

    def _global(self, local: Tensor, shape: torch.Size) -> Tensor:
        local = local.contiguous()
        if self._mesh is None:
            return local
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )


def _names(name: str) -> list[str]:
    return [f"model.{name}", *(f"optimizer.{key}.{name}" for key in MOMENTS)]


def _overlap(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


def _flat_tensors(optimizer: Any) -> list[Tensor]:
    """Return the float32 weights of this rank, as the optimizer inside steps them."""
    for name in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # stage 1 in bfloat16
    ):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise AssertionError(f"an optimizer of DeepSpeed that is not known: {type(optimizer).__name__}")


def _check_group(optimizer: Any, dims: ParallelDims) -> None:
    ranks = dist.get_process_group_ranks(optimizer.dp_process_group)
    assert ranks == list(range(dims.world_size)), (
        f"DeepSpeed shares dense parameters out over the ranks {ranks}, but they belong to all "
        f"{dims.world_size}"
    )
