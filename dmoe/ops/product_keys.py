"""The k best pairs of two lists of scores, without looking at all pairs (product keys).

Lample et al., arXiv 1907.05242, section 3.2: a pair among the k best has both its halves among the
k best of their lists, so k^2 pairs are compared instead of n^2. Shapes: R rows, n scores a list.
"""

import torch
from torch import Tensor

from dmoe.ops.top_k import top_k_ids


def top_k_pairs(first_Rn: Tensor, second_Rn: Tensor, k: int) -> Tensor:
    """Return (R, k) int64 ids i n + j of the largest first[i] + second[j], largest first.

    Ties go to the lowest id. k is at most n.
    """
    num = first_Rn.shape[1]
    # In the order of their ids, as the pairs are then too: the lowest of equals comes first.
    i_Rk, j_Rk = (top_k_ids(scores, k).sort(dim=1).values for scores in (first_Rn, second_Rn))
    ids_RC = (i_Rk[:, :, None] * num + j_Rk[:, None, :]).flatten(1)
    sums_RC = scores_of_pairs(first_Rn, second_Rn, ids_RC)
    return ids_RC.gather(1, top_k_ids(sums_RC, k))


def top_k_pairs_loop(first_Rn: Tensor, second_Rn: Tensor, k: int) -> Tensor:
    """Define `top_k_pairs`: all n^2 pairs."""
    sums_Rnn = first_Rn[:, :, None] + second_Rn[:, None, :]
    return torch.sort(sums_Rnn.flatten(1), dim=1, descending=True, stable=True).indices[:, :k]


def scores_of_pairs(first_Rn: Tensor, second_Rn: Tensor, ids_RC: Tensor) -> Tensor:
    """Return first[i] + second[j] of the pairs i n + j."""
    num = first_Rn.shape[1]
    return first_Rn.gather(1, ids_RC // num) + second_Rn.gather(1, ids_RC % num)
