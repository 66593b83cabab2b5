"""The losses of sparsely-gated MoE: squared coefficients of variation of importance and load.

Shazeer et al. 2017, arXiv 1701.06538: importance is the sum of an expert's gates (eq. 6-7), load a
smooth estimate of its number of tokens (eq. 8-11). Called by the routers that have the noise which
makes the estimate. Shapes: T tokens, E experts, K slots per token.
"""

from torch import Tensor

from dmoe.moe.routing import BatchTotals


def squared_variation(amount_E: Tensor) -> Tensor:
    """Return CV^2 = variance / mean^2 of an amount per expert, 0 where all are 0."""
    mean = amount_E.mean()
    # An amount of less than this over all experts is none; a batch of nothing but padding has 0.
    return (amount_E - mean).square().mean() / mean.square().clamp(min=1e-10)


def importance(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """Return (E,) the sum of each expert's gates."""
    used_TK = ids_TK >= 0
    return weights_TK.new_zeros(num_experts).index_add(0, ids_TK[used_TK], weights_TK[used_TK])


def variation_losses(amounts: dict[str, Tensor], totals: BatchTotals | None) -> dict[str, Tensor]:
    """Return this micro-batch's share of a loss for each amount, the mean of CV^2 over
    micro-batches; none outside training.

    Args:
        amounts: (E,) each, by the name of the loss.
        totals: sizes of the global batch; None outside training.
    """
    if totals is None:
        return {}
    shares = {name: squared_variation(amount_E) for name, amount_E in amounts.items()}
    return {name: share / totals.num_micro_batches for name, share in shares.items()}
