"""The layout of the ranks, on one process and on four."""

import pytest
import torch.distributed as dist

from dmoe.config.base import ConfigError
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed


def _ranks(group: dist.ProcessGroup | None) -> list[int]:
    return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)


def _check_layouts() -> None:
    rank = dist.get_rank()
    # Expert-parallel and expert-data-parallel ranks of this rank, for each degree.
    expected = {
        1: ([rank], [0, 1, 2, 3]),
        2: ([[0, 1], [2, 3]][rank // 2], [[0, 2], [1, 3]][rank % 2]),
        4: ([0, 1, 2, 3], [rank]),
    }
    for ep, (ep_ranks, edp_ranks) in expected.items():
        dims = ParallelDims.create(ep=ep)
        assert (dims.world_size, dims.rank, dims.ep, dims.edp) == (4, rank, ep, 4 // ep)
        assert _ranks(dims.world_group) == [0, 1, 2, 3]
        assert (_ranks(dims.ep_group), _ranks(dims.edp_group)) == (ep_ranks, edp_ranks)
        assert (dims.ep_group is None) == (ep == 1)
        assert (dims.edp_group is None) == (ep == 4)
        assert ep_ranks[dims.ep_rank] == edp_ranks[dims.edp_rank] == rank
        # All experts in order over ep, the same ones over edp.
        local = list(dims.local_experts(8))
        assert len(local) == 8 // ep
        assert local[0] == dims.ep_rank * len(local)
        # Sharding dim 0 over the expert mesh in axis order gives each rank a slice of its experts.
        assert dims.expert_mesh is not None
        assert list(dims.expert_mesh.get_coordinate()) == [dims.ep_rank, dims.edp_rank]
        assert dims.dense_mesh is not None
        assert list(dims.dense_mesh.get_coordinate()) == [rank]

    for ep in (3, 8):
        with pytest.raises(
            ConfigError, match=rf"parallel\.ep = {ep} .* number of ranks, 4"
        ) as error:
            ParallelDims.create(ep=ep)
        assert error.value.key == "parallel.ep"


def test_layouts_of_four_ranks() -> None:
    run_distributed(_check_layouts, 4)


def test_one_process_needs_no_group() -> None:
    dims = ParallelDims.create()
    assert dims == ParallelDims()
    assert (dims.edp, dims.ep_rank, dims.edp_rank) == (1, 0, 0)
    assert dims.world_group is dims.ep_group is dims.edp_group is None
    assert dims.local_experts(8) == range(8)


def test_one_process_cannot_share_out_experts() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep = 2 .* number of ranks, 1"):
        ParallelDims.create(ep=2)


def test_experts_are_divided_in_order() -> None:
    held = [ParallelDims(world_size=8, rank=rank, ep=4).local_experts(12) for rank in range(8)]
    assert [list(experts) for experts in held] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ] * 2


def test_describes_itself_in_a_line() -> None:
    dims = ParallelDims(world_size=16, ep=8)
    assert dims.describe(64) == "world 16 = edp 2 x ep 8 | dense over 16 | 64 experts, 8 per rank"
    assert dims.describe(0) == "world 16 = edp 2 x ep 8 | dense over 16 | no experts"
