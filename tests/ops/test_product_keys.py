"""Product-key top-k equals that over all pairs, ties too."""

import pytest
import torch

from dmoe.ops.product_keys import scores_of_pairs, top_k_pairs, top_k_pairs_loop


@pytest.mark.parametrize("num", [1, 2, 7, 64])
@pytest.mark.parametrize("k", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_brute_force(num: int, k: int, dtype: torch.dtype) -> None:
    if k > num:
        k = num
    generator = torch.Generator().manual_seed(num * 100 + k)
    normal = torch.randn(2, 50, num, generator=generator).to(dtype)
    integers = torch.randint(-2, 3, (2, 50, num), generator=generator).to(dtype)
    for first, second in (normal, integers, torch.zeros_like(normal)):
        ids = top_k_pairs(first, second, k)
        assert torch.equal(ids, top_k_pairs_loop(first, second, k))
        expected = (first[:, :, None] + second[:, None, :]).flatten(1).gather(1, ids)
        assert torch.equal(scores_of_pairs(first, second, ids), expected)


def test_by_hand() -> None:
    """3 + 5 beats 3 + 4, which ties with 2 + 5: the pair of the lower id comes first."""
    first, second = torch.tensor([[2.0, 3.0, 0.0]]), torch.tensor([[5.0, 0.0, 4.0]])
    assert top_k_pairs(first, second, 3).tolist() == [[3, 0, 5]]


def test_no_rows() -> None:
    assert top_k_pairs(torch.zeros(0, 4), torch.zeros(0, 4), 2).shape == (0, 2)
