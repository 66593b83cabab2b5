import pytest
import torch

from dmoe.ops.top_k import top_k_ids, top_k_ids_sorted


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equals_the_stable_sort(k) -> None:
    torch.manual_seed(0)
    random = torch.randn(50, 8)
    # Few distinct values make many ties; signed zeros are equal; -inf is the last resort.
    ties = torch.randint(-1, 2, (50, 8)).float()
    special = torch.tensor([[0.0, -0.0, 1.0, -1.0, float("-inf"), 0.0, -0.0, float("-inf")]])
    for scores in (random, ties, special):
        assert torch.equal(top_k_ids(scores, k), top_k_ids_sorted(scores, k))


def test_all_equal_scores_choose_the_lowest_ids() -> None:
    assert top_k_ids(torch.zeros(2, 5), 3).tolist() == [[0, 1, 2], [0, 1, 2]]
