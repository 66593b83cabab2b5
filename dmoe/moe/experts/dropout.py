"""Expert dropout: neurons of experts fall out in training.

Paper: Switch, arXiv 2101.03961, section 2.4, which fine-tunes with a larger rate inside experts
    than elsewhere.
Equations: act(W1 x) m / (1 - rate), where m is 0 at the given rate and else 1.
Config: `model.moe.expert_dropout: 0.4`.
Differs: which neurons fall out is a function of the token and the expert, so no layout changes it.
Shapes: R routed rows, e local experts, F expert dim.
"""

import torch
from torch import Tensor

from dmoe.moe.routing import MoEContext
from dmoe.rng import stream_key, token_uniform


def dropout_factors(
    rate: float,
    numbers_R: Tensor,
    counts_e: Tensor,
    *,
    first: int,
    num_experts: int,
    width: int,
    context: MoEContext,
) -> Tensor:
    """Return (R, F) 0 with probability `rate`, and else 1 / (1 - rate).

    Args:
        rate: of neurons that fall out, in [0, 1).
        numbers_R: (R,) number of each row's token; rows are sorted by expert.
        counts_e: (e,) rows of each local expert.
        first: number of the first local expert.
        num_experts: of the layer, on all ranks.
        width: F.
        context: has what the draw is a function of, beside token and expert.
    """
    local_e = torch.arange(first, first + len(counts_e), device=numbers_R.device)
    ids_R = numbers_R * num_experts + local_e.repeat_interleave(counts_e)
    key = stream_key(context.seed, "expert_dropout", context.step, context.layer)
    return (token_uniform(key, ids_R, width) >= rate) / (1 - rate)
