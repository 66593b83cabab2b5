"""The cross-entropy of held-out text: nats a token, perplexity, bits per byte.

Called by the trainer every few steps and by `dmoe eval`. Shape letters: B batch, S sequence.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from dmoe.data import MicroBatch, TokenSplit, eval_batches
from dmoe.models import DecoderLM, ModelInputs, lm_loss
from dmoe.parallel import ParallelDims, all_reduce_sum


@dataclass(frozen=True)
class EvalResult:
    """How well a model predicts a text; equal on every rank."""

    loss: float
    """Cross-entropy in nats a predicted token."""
    num_targets: int
    """Predicted tokens: not padding, nor the first token of a document where documents are
    separate; the end-of-document token is one of them."""
    bits_per_byte: float | None = None
    """The loss in bits a byte of the text; None where its bytes are not known."""
    k_mean: float | None = None
    """Mean number of experts that a token had in a MoE layer, less those without capacity; None for
    a dense model."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: DecoderLM, batches: Iterable[MicroBatch], *, group: dist.ProcessGroup | None = None
) -> EvalResult:
    """Return the loss over all batches of all ranks.

    It depends on neither the micro-batch size nor the number of ranks, unless experts have a
    capacity, which the tokens of a micro-batch share.

    Args:
        model: any decoder; the ranks of `group` hold it together.
        batches: this rank's share, as many as every other rank's (`eval_batches` sees to it).
        group: the ranks that share the batches; None for one.

    Raises:
        ValueError: no batch of any rank has a token to predict.
    """
    device = model.embed.weight.device
    # float64 sums, so that millions of tokens add up whatever the order.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        num_targets, num_tokens = batch.num_targets, batch.valid_BS.sum()
        batch = batch.to(device)
        output = model(inputs_of(batch))
        sums[0] += lm_loss(output.logits, batch.labels_BS)
        sums[1] += num_targets
        for layer in output.moe:
            sums[2] += layer.stats.counts_E.sum() - layer.stats.dropped
            sums[3] += num_tokens
    nats, num_targets, num_slots, num_routed = all_reduce_sum(sums, group).tolist()
    if not num_targets:
        raise ValueError("the evaluation batches hold no token to predict")
    k_mean = num_slots / num_routed if num_routed else None
    return EvalResult(nats / num_targets, int(num_targets), k_mean=k_mean)


def inputs_of(batch: MicroBatch) -> ModelInputs:
    """Return what a model reads of a micro-batch."""
    return ModelInputs(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS)


def evaluate_split(
    model: DecoderLM,
    split: TokenSplit,
    *,
    seq_len: int,
    micro_batch_size: int,
    mask_documents: bool = True,
    dims: ParallelDims | None = None,
    max_batches: int | None = None,
) -> EvalResult:
    """Return the loss on a split, each token predicted once from those before it in its window.

    Bits per byte are loss / ln 2 x tokens / bytes of the text. All tokens of the split count there:
    those that are not predicted (the first of a document) at the mean loss, and the
    end-of-document tokens, which are no bytes.

    Args:
        model: any decoder; the ranks of `dims` hold it together.
        split: held-out text.
        seq_len: tokens in a window.
        micro_batch_size: windows in a forward pass.
        mask_documents: whether documents in a window are separate, as in training.
        dims: the ranks that share the work; None for one process.
        max_batches: measure the first so many micro-batches, over all ranks; None for all.

    Raises:
        ConfigError: a token id beyond the model's vocabulary.
    """
    dims = dims or ParallelDims()
    batches = eval_batches(
        split,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        vocab_size=model.config.vocab_size,
        mask_documents=mask_documents,
        rank=dims.rank,
        world=dims.world_size,
        max_batches=max_batches,
    )
    result = evaluate(model, batches, group=dims.world_group)
    return replace(result, bits_per_byte=split.bits_per_byte(result.loss))
