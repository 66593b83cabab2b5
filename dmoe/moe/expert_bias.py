"""Loss-free load balancing: a selection bias per expert that follows the load.

Paper: Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
Equations: b_e += rate sign(mean load - load_e) after each step.
Config: `model.moe.router: {name: top_k, bias_update_rate: 0.001}`.
Differs: nothing; the load is that of the global batch.
Shapes: E experts.
"""

import torch
from torch import Tensor


def update_expert_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """Raise the bias of the experts below mean load and lower that of those above, in place.

    Args:
        bias_E: (E,) selection bias.
        counts_E: (E,) slots of each expert over the whole global batch of the step.
        rate: size of the step; only the sign of the error counts.
    """
    load_E = counts_E.to(bias_E)
    bias_E += rate * torch.sign(load_E.mean() - load_E)
