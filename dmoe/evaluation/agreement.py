"""How far a router ranks experts alike at two numbers of active experts.

A layer's logits depend on k through its input alone, so the first MoE layer agrees with itself
exactly, and later ones as far as the layers before them say the same at both k. This is a
definition of ours; Matryoshka MoE (arXiv 2509.26520) reports a "focused Spearman correlation"
without one. Called by `dmoe eval --agreement`. Shapes: T tokens, E experts, L MoE layers.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from dmoe.data import MicroBatch
from dmoe.evaluation.perplexity import inputs_of
from dmoe.models import DecoderLM
from dmoe.moe import Routing


@torch.no_grad()
def router_agreement(
    model: DecoderLM,
    batches: Iterable[MicroBatch],
    k: int | Sequence[int],
    other_k: int | Sequence[int],
    *,
    top: int | None = None,
) -> tuple[float, ...]:
    """Return the agreement of each MoE layer, (L,) numbers from -1 to 1.

    The model reads every batch twice. The agreement of a token in a layer is Spearman's rank
    correlation between the logits of the two passes, over the experts that are among the `top`
    largest of either; it is averaged over the tokens that are not padding.

    Args:
        model: a decoder with experts.
        batches: what it reads.
        k: experts per token of the first pass, one number or one a layer.
        other_k: those of the second pass.
        top: of how many experts the order counts; the larger k of the layer if None.

    Raises:
        ConfigError: the model cannot run at such a k, or `top` is not from 1 to E.
        ValueError: the batches hold no token.
    """
    k_L, other_L = model.config.k_of_layers(k), model.config.k_of_layers(other_k)
    tops = model.config.k_of_layers([*map(max, k_L, other_L)] if top is None else top)
    sums_L = torch.zeros(len(tops), dtype=torch.float64)
    num_tokens = 0
    for batch in batches:
        valid_T = batch.valid_BS.flatten()
        num_tokens += int(valid_T.sum())
        pairs = zip(_logits(model, batch, k_L), _logits(model, batch, other_L), strict=True)
        for layer, (logits_TE, other_TE) in enumerate(pairs):
            agreement_T = rank_agreement(logits_TE, other_TE, tops[layer])
            sums_L[layer] += agreement_T.cpu()[valid_T].sum()
    if not num_tokens:
        raise ValueError("the batches hold no token")
    return tuple((sums_L / num_tokens).tolist())


def rank_agreement(logits_TE: Tensor, other_TE: Tensor, top: int) -> Tensor:
    """Return (T,) float64 Spearman correlation over the experts in the `top` of either argument.

    Ranks are counted among these n experts, equal logits by the lowest id as in routing, so that
    it is 1 - 6 sum(d^2) / (n (n^2 - 1)) with the differences d of the ranks. One expert alone
    agrees with itself: 1.
    """
    both_TE = (_ranks(logits_TE) < top) | (_ranks(other_TE) < top)
    lowest = -torch.inf
    ranks_TE = _ranks(logits_TE.masked_fill(~both_TE, lowest))
    differences_TE = (ranks_TE - _ranks(other_TE.masked_fill(~both_TE, lowest))) * both_TE
    squares_T = differences_TE.double().square().sum(1)
    n_T = both_TE.sum(1).double()
    return 1 - 6 * squares_T / (n_T * (n_T.square() - 1)).clamp(min=1)


def _ranks(logits_TE: Tensor) -> Tensor:
    """Return (T, E) place of each expert, 0 for the largest logit."""
    return logits_TE.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)


def _logits(model: DecoderLM, batch: MicroBatch, k_L: Sequence[int]) -> list[Tensor]:
    """Return the (T, E) router logits of each MoE layer."""
    logits: list[Tensor] = []

    def keep(_module: object, _arguments: object, routing: Routing) -> None:
        logits.append(routing.logits_TE)

    with ExitStack() as stack, model.at_k(k_L):
        for layer in model.moe_layers:
            stack.callback(layer.router.register_forward_hook(keep).remove)
        model(inputs_of(batch.to(model.embed.weight.device)))
    return logits
