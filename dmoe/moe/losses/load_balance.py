"""The load-balancing loss, which is 1 at perfect balance for every k.

Paper: Switch, arXiv 2101.03961, eq. 4-6; GShard, arXiv 2006.16668, section 2.2; DeepSeek-V3, arXiv
    2412.19437, eq. 17-20; Qwen, arXiv 2501.11873.
Equations: E sum_i f_i P_i, where f_i is the share of slots that went to expert i and P_i its mean
    router probability. Over the tokens of which set the means are taken is the scope: a
    micro-batch, a local group of so many tokens (GShard, where f_i counts first choices alone), a
    sequence (DeepSeek) or the global batch (Qwen).
Config: `model.moe.losses: {load_balance_weight: 0.01, load_balance_scope: global_batch}`.
Differs: f_i is a share of slots, not of tokens, so that k does not change the value at balance. It
    counts the slots that were chosen, by bias and groups too, where DeepSeek-V3 counts the largest
    scores.
Shapes: T tokens, E experts, G groups of tokens.
"""

from typing import Literal

import torch
from torch import Tensor

from dmoe.moe.losses.groups import GroupScope, groups_of_batch, in_groups
from dmoe.moe.routing import BatchTotals, Routing

BalanceScope = GroupScope | Literal["global_batch"]
BalanceChoices = Literal["all", "first"]


def load_balance_loss(
    routing: Routing,
    totals: BatchTotals,
    *,
    scope: BalanceScope,
    seq_len: int,
    valid_T: Tensor | None = None,
    counts_E: Tensor | None = None,
    choices: BalanceChoices = "all",
) -> Tensor:
    """Return this micro-batch's share of the loss; the shares of a global batch sum to the loss.

    Args:
        routing: the router's decision on the micro-batch.
        totals: sizes of the global batch.
        scope: the set of tokens that is to be balanced, or the size of groups of consecutive tokens
            of the micro-batch; the loss is the mean over such sets.
        seq_len: tokens per sequence.
        valid_T: (T,) bool, False for padding; None where there is none.
        counts_E: slots per expert over the whole global batch; needed by that scope.
        choices: the slots that f_i counts; the global batch's are all.

    Returns:
        A scalar in the scores' dtype; its gradient flows through the probabilities.
    """
    scores_TE = routing.scores_TE
    if valid_T is not None:
        scores_TE = scores_TE * valid_T[:, None]
    num_experts = scores_TE.shape[1]
    if scope == "global_batch":
        assert counts_E is not None, "the global scope needs the counts of the global batch"
        share_E = counts_E.to(scores_TE) / counts_E.sum().clamp(min=1)
        return num_experts * (share_E * scores_TE.sum(0)).sum() / totals.num_tokens

    num_tokens = scores_TE.shape[0]
    sizes = {"sequence": seq_len, "micro_batch": max(1, num_tokens)}
    group_size = scope if isinstance(scope, int) else sizes[scope]
    num_groups = groups_of_batch(scope, group_size, num_tokens, totals)
    scores_GE = in_groups(scores_TE, group_size).sum(1)
    ids_TK = routing.expert_ids_TK if choices == "all" else routing.expert_ids_TK[:, :1]
    counts_GE = _count_by_group(ids_TK, group_size, num_experts)
    share_GE = counts_GE.to(scores_GE) / counts_GE.sum(1, keepdim=True).clamp(min=1)
    # The rows of scores sum to 1, so the sum over a group is its number of valid tokens.
    mean_GE = scores_GE / scores_GE.detach().sum(1, keepdim=True).clamp(min=1)
    return num_experts * (share_GE * mean_GE).sum() / num_groups


def _count_by_group(expert_ids_TK: Tensor, group_size: int, num_experts: int) -> Tensor:
    num_tokens = expert_ids_TK.shape[0]
    group_T1 = torch.arange(num_tokens, device=expert_ids_TK.device)[:, None] // group_size
    bins = (group_T1 * num_experts + expert_ids_TK)[expert_ids_TK >= 0]
    num_bins = -(-num_tokens // group_size) * num_experts
    return torch.bincount(bins, minlength=num_bins).view(-1, num_experts)
