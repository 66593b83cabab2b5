"""The chain of a top-k router by the kernels: choose experts, then weigh them.

Two ops and not one: a choice is made once, while gates are computed again with activations.
Shapes: T tokens, E experts, K slots per token.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops.top_k import top_k_ids_sorted


class GateForm(NamedTuple):
    """How logits become gates."""

    score: Literal["softmax", "sigmoid"]
    over_choice: bool
    """Take the softmax over a token's chosen logits, instead of over all."""
    normalize: bool
    """Divide a token's gates by their sum."""
    scale: float
    """Multiplies the gates."""


def select_experts(
    logits_TE: Tensor,
    bias_E: Tensor,
    k: int | Tensor,
    most_k: int,
    valid_T: Tensor | None,
    score: Literal["softmax", "sigmoid"],
) -> Tensor:
    """Return (T, K) int64 ids of the largest score + bias, largest first, ties by lowest id.

    Args:
        logits_TE: float32.
        bias_E: added to scores for the choice alone.
        k: experts of every token, or (T,) int64 of each.
        most_k: K, the largest k; the host does not wait to learn it.
        valid_T: (T,) bool, False for padding, which gets none; None without padding.
        score: of `GateForm`.

    Returns:
        The ids, -1 in slots that a token does not use. They have no gradient.
    """
    from dmoe_kernels.routing import select

    k_T = k.contiguous() if isinstance(k, Tensor) else None
    valid_T = None if valid_T is None else valid_T.contiguous()
    logits_TE = logits_TE.detach()
    return select(logits_TE, bias_E.contiguous(), k_T, valid_T, top_k=most_k, score=score)


def select_experts_torch(
    logits_TE: Tensor,
    bias_E: Tensor,
    k: int | Tensor,
    most_k: int,
    valid_T: Tensor | None,
    score: Literal["softmax", "sigmoid"],
) -> Tensor:
    """Define `select_experts`."""
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    ids_TK = top_k_ids_sorted(scores_TE + bias_E, most_k)
    used_TK = torch.arange(most_k) < torch.as_tensor(k).reshape(-1, 1)
    if valid_T is not None:
        used_TK = used_TK & valid_T[:, None]
    return ids_TK.where(used_TK, -1)


def weigh_experts(logits_TE: Tensor, ids_TK: Tensor, form: GateForm) -> tuple[Tensor, Tensor]:
    """Return (T, E) probabilities, rows summing to 1, and (T, K) gates, 0 in unused slots.

    Args:
        logits_TE: float32; it alone is saved for backward, with the ids.
        ids_TK: int64 chosen experts, -1 where a slot is unused.
        form: how logits become gates.
    """
    return _Weigh.apply(logits_TE, ids_TK, form)


def weigh_experts_torch(logits_TE: Tensor, ids_TK: Tensor, form: GateForm) -> tuple[Tensor, Tensor]:
    """Define `weigh_experts`, autograd for the gradient."""
    used_TK, place_TK = ids_TK >= 0, ids_TK.clamp(min=0)
    if form.score == "softmax":
        scores_TE = probabilities_TE = logits_TE.softmax(-1)
    else:
        scores_TE = logits_TE.sigmoid()
        probabilities_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    if form.over_choice:
        chosen_TK = logits_TE.gather(1, place_TK).masked_fill(~used_TK, -1e30)
        weights_TK = chosen_TK.softmax(-1)
    else:
        weights_TK = scores_TE.gather(1, place_TK)
    weights_TK = weights_TK.masked_fill(~used_TK, 0)
    if form.normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20)
    return probabilities_TE, weights_TK * form.scale


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, ids_TK: Tensor, form: GateForm
    ) -> tuple[Tensor, Tensor]:
        from dmoe_kernels.routing import weigh

        logits_TE, ids_TK = logits_TE.contiguous(), ids_TK.contiguous()
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return weigh(logits_TE, ids_TK, **form._asdict())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dscores_TE: Tensor | None, dweights_TK: Tensor | None
    ) -> tuple[Tensor, None, None]:
        from dmoe_kernels.routing import weigh_backward

        gradients = [g if g is None else g.contiguous() for g in (dscores_TE, dweights_TK)]
        return weigh_backward(*ctx.saved_tensors, *gradients, **ctx.form._asdict()), None, None
