"""The forward and backward passes of one step, the same for every engine.

Losses are divided by the sizes of the global batch before the backward pass, so gradients are plain
sums over micro-batches and ranks: dense ones over all ranks, an expert's over the ranks that hold
it (the all-to-all has already brought it the gradients of its tokens).

Shapes: T tokens, L MoE layers, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.data import MicroBatch
from dmoe.engine.base import StepPosition, StepResult
from dmoe.engine.tally import Tally
from dmoe.models import DecoderLM, ModelInputs, ModelOutput, Recompute
from dmoe.models.decoder import lm_loss, valid_tokens
from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.elastic import ElasticK
from dmoe.moe.stats import all_counts
from dmoe.parallel import ParallelDims, all_reduce_sum


@dataclass(frozen=True)
class Passes:
    """What the passes of all steps have in common."""

    model: DecoderLM
    dims: ParallelDims
    device: torch.device
    recompute: Recompute
    forward: Callable[..., ModelOutput]
    """The model, or what calls it with the same arguments."""
    backward: Callable[[Tensor, bool], None]
    """Takes the objective of a micro-batch, and whether it is this rank's last of the step."""

    def run(self, batches: Sequence[MicroBatch], position: StepPosition) -> StepResult:
        """Pass this rank's share of the global batch forward and backward."""
        totals = self._totals(batches, position)
        batches = [batch.to(self.device) for batch in batches]
        k = self._elastic_k(position)
        counts_LE = self._count_beforehand(batches, position, k)
        moe = self.model.config.moe
        aux_weights = moe.loss_weights() if moe else {}
        tally = Tally(self.model.config)
        for index, batch in enumerate(batches):
            context = _context(batch, position, totals, counts_LE, k)
            output = self.forward(_inputs(batch), context, recompute=self.recompute)
            loss = lm_loss(output.logits, batch.labels_BS) / totals.num_targets
            objective = loss
            for layer in output.moe:
                for name, weight in aux_weights.items():
                    objective = objective + weight * layer.losses[name]
            self.backward(objective, index == len(batches) - 1)
            tally.add(loss, output.moe)
        return tally.result(self.dims.world_group, totals)

    def _totals(self, batches: Sequence[MicroBatch], position: StepPosition) -> BatchTotals:
        sizes = torch.tensor(
            [
                sum(int(batch.valid_BS.sum()) for batch in batches),
                sum(batch.num_targets for batch in batches),
            ]
        )
        num_tokens, num_targets = all_reduce_sum(sizes, self.dims.world_group).tolist()
        # A batch of nothing but padding has a loss of zero, not of 0 / 0.
        return BatchTotals(
            max(1, num_tokens),
            max(1, num_targets),
            position.num_sequences,
            position.num_micro_batches,
        )

    @torch.no_grad()
    def _count_beforehand(
        self, batches: Sequence[MicroBatch], position: StepPosition, k: ElasticK | None
    ) -> Tensor | None:
        """Return (L, E) slots per expert over the global batch, if no single pass can know them.

        The global balance loss of one micro-batch depends on the choices in all the others. With
        one micro-batch a rank an all-reduce in the layer tells; with more, a pass without
        gradients counts first, so that accumulation does not change the loss.
        """
        moe = self.model.config.moe
        if moe is None or not moe.needs_global_counts or len(batches) == 1:
            return None
        counts_LE = torch.zeros(
            len(self.model.moe_layers), moe.num_slots_counted, dtype=torch.int64, device=self.device
        )
        totals = BatchTotals(1, 1, position.num_sequences, position.num_micro_batches)
        for batch in batches:
            # Any counts do: the losses of this pass are not used.
            context = _context(batch, position, totals, counts_LE, k)
            output = self.model(_inputs(batch), context, last_only=True)
            counts_LE += torch.stack([all_counts(layer.stats) for layer in output.moe])
        return all_reduce_sum(counts_LE, self.dims.world_group)

    def _elastic_k(self, position: StepPosition) -> ElasticK | None:
        moe = self.model.config.moe
        if moe is None or moe.elastic is None:
            return None
        return ElasticK(moe.elastic, num_layers=len(self.model.moe_layers), seed=position.seed)


def _inputs(batch: MicroBatch) -> ModelInputs:
    return ModelInputs(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS)


def _context(
    batch: MicroBatch,
    position: StepPosition,
    totals: BatchTotals,
    counts_LE: Tensor | None,
    k: ElasticK | None,
) -> MoEContext:
    seq_len = batch.tokens_BS.shape[1]
    first = batch.sample_ids_B.to(batch.tokens_BS.device) * seq_len
    offsets = torch.arange(seq_len, device=batch.tokens_BS.device)
    token_ids_T = (first[:, None] + offsets).flatten()
    return MoEContext(
        seq_len=seq_len,
        valid_T=valid_tokens(_inputs(batch)),
        token_ids_T=token_ids_T,
        totals=totals,
        counts_LE=counts_LE,
        k_L=k.k_L(position.step, batch.index, token_ids_T) if k else None,
        k_ideal=k.config.k_ideal if k else None,
        seed=position.seed,
        step=position.step,
        micro_batch=batch.index,
    )
