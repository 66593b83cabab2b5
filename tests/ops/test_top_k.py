import pytest
import torch

from dmoe.ops.top_k import top_k_ids, top_k_ids_sorted, top_k_of_candidates


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_in_any_order_are_chosen_by_score_and_then_by_id(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores_TC = torch.randint(-2, 3, (50, 9), generator=generator).to(dtype)
    ids_TC = torch.rand(50, 9, generator=generator).argsort(1) * 2**28
    best = top_k_of_candidates(scores_TC, ids_TC, 4)
    for row, scores, ids in zip(best.tolist(), scores_TC.tolist(), ids_TC.tolist(), strict=True):
        assert row == [i for _, i in sorted(zip([-s for s in scores], ids, strict=True))[:4]]
