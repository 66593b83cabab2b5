"""The router z-loss, which keeps logits small.

Paper: ST-MoE, arXiv 2202.08906, eq. 5.
Equations: the mean over tokens of (log sum_j exp x_j)^2.
Config: `model.moe.losses: {z_loss_weight: 0.001}`, the weight of the paper.
Differs: nothing; padding does not count.
Shapes: T tokens, E experts.
"""

from torch import Tensor

from dmoe.moe.routing import BatchTotals


def z_loss(logits_TE: Tensor, totals: BatchTotals, valid_T: Tensor | None = None) -> Tensor:
    """Return this micro-batch's share of the loss; the shares of a global batch sum to the mean.

    Args:
        logits_TE: (T, E) router logits.
        totals: sizes of the global batch.
        valid_T: (T,) bool, False for padding; None where there is none.
    """
    squared_T = logits_TE.logsumexp(-1).square()
    if valid_T is not None:
        squared_T = squared_T * valid_T
    return squared_T.sum() / totals.num_tokens
