import os

import pytest
import torch
import torch.distributed as dist

from dmoe.testing import run_distributed


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), total


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("rank one has had enough")
    dist.barrier()


def _die() -> None:
    os._exit(3)


def test_returns_the_value_of_each_rank() -> None:
    results = run_distributed(_sum_of_ranks, 2, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert [total.item() for _, total in results] == [21, 21]


def test_an_exception_names_the_rank_and_the_cause() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed(.|\n)*had enough"):
        run_distributed(_fail_on_rank_one, 2)


def test_a_dead_process_is_noticed() -> None:
    with pytest.raises(AssertionError, match="died with exit code 3"):
        run_distributed(_die, 2)
