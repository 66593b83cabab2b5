"""Groups of consecutive tokens, and how many a global batch has."""

import pytest
import torch

from dmoe.moe import BatchTotals
from dmoe.moe.losses.groups import groups_of_batch, in_groups


def test_the_last_group_is_filled_up() -> None:
    values_T2 = torch.arange(10).view(5, 2)
    grouped = in_groups(values_T2, 3)
    assert grouped.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [0, 0]]]
    assert in_groups(torch.ones(2, dtype=torch.bool), 3).tolist() == [[True, True, False]]
    assert in_groups(values_T2[:0], 3).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("scope", "size", "expected"),
    [("micro_batch", 10, 4), ("sequence", 5, 8), (4, 4, 12), (20, 20, 4)],
)
def test_groups_of_a_global_batch(scope, size, expected) -> None:
    """Four micro-batches of two sequences of five tokens."""
    totals = BatchTotals(37, 37, num_sequences=8, num_micro_batches=4)
    assert groups_of_batch(scope, size, 10, totals) == expected
    assert groups_of_batch(scope, size, 0, totals) > 0
