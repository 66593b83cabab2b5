"""The k best pairs of two lists of scores, without looking at all pairs (product keys).

Lample et al., arXiv 1907.05242, section 3.2: a pair among the k best has both its halves among the
k best of their lists. Of those k^2 pairs, the ranks of one among the k best have a product of k at
most, which leaves about k log k to compare. Shapes: R rows, n scores a list, C candidates.
"""

import torch
from torch import Tensor

from dmoe.ops.top_k import top_k_ids, top_k_of_candidates


def top_k_pairs(first_Rn: Tensor, second_Rn: Tensor, k: int) -> Tensor:
    """Return (R, k) int64 ids i n + j of the largest first[i] + second[j], largest first.

    Ties go to the lowest id. k is at most n, and n at most 65,536.
    """
    num = first_Rn.shape[1]
    i_Rk, j_Rk = top_k_ids(first_Rn, k), top_k_ids(second_Rn, k)
    # The a b pairs with ranks up to a and b are no worse than the one of ranks a and b.
    rank_k = torch.arange(1, k + 1, device=first_Rn.device)
    a_C, b_C = (rank_k[:, None] * rank_k <= k).nonzero().unbind(1)
    i_RC, j_RC = i_Rk[:, a_C], j_Rk[:, b_C]
    sums_RC = first_Rn.gather(1, i_RC) + second_Rn.gather(1, j_RC)
    return top_k_of_candidates(sums_RC, i_RC * num + j_RC, k)


def top_k_pairs_loop(first_Rn: Tensor, second_Rn: Tensor, k: int) -> Tensor:
    """Define `top_k_pairs`: all n^2 pairs."""
    sums_Rnn = first_Rn[:, :, None] + second_Rn[:, None, :]
    return torch.sort(sums_Rnn.flatten(1), dim=1, descending=True, stable=True).indices[:, :k]


def scores_of_pairs(first_Rn: Tensor, second_Rn: Tensor, ids_RC: Tensor) -> Tensor:
    """Return first[i] + second[j] of the pairs i n + j."""
    num = first_Rn.shape[1]
    return first_Rn.gather(1, ids_RC // num) + second_Rn.gather(1, ids_RC % num)
