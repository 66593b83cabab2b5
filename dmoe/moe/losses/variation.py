"""The losses on importance and load: squared coefficients of variation.

Paper: sparsely-gated MoE, Shazeer et al. 2017, arXiv 1701.06538.
Equations: importance is the sum of an expert's gates (eq. 6-7), load a smooth estimate of its
    number of tokens (eq. 8-11), which the routers make that have the noise for it.
Config: `importance_weight` and `load_weight` of `model.moe.router`, of these routers.
Differs: nothing; the set of tokens that is summed over can be smaller than a batch.
Shapes: T tokens, E experts, K slots per token, G groups of tokens.
"""

from torch import Tensor


def squared_variation(amount_GE: Tensor) -> Tensor:
    """Return CV^2 = variance / mean^2 over the last dim, 0 where all are 0."""
    mean_G1 = amount_GE.mean(-1, keepdim=True)
    # An amount of less than this over all experts is none; a batch of nothing but padding has 0.
    floor_G = mean_G1.square().squeeze(-1).clamp(min=1e-10)
    return (amount_GE - mean_G1).square().mean(-1) / floor_G


def gates_of_experts(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """Return (T, E) the gate of each expert, whose sum over tokens is its importance."""
    gates_TE = weights_TK.new_zeros(len(ids_TK), num_experts)
    return gates_TE.scatter_add(1, ids_TK.clamp(min=0), weights_TK)


def variation_losses(amounts: dict[str, Tensor], num_groups: int) -> dict[str, Tensor]:
    """Return this micro-batch's share of a loss for each amount: the mean of CV^2 over groups.

    Args:
        amounts: (G, E) each, those of the micro-batch's groups, by the name of the loss.
        num_groups: those of the global batch.
    """
    return {name: squared_variation(a).sum() / num_groups for name, a in amounts.items()}
