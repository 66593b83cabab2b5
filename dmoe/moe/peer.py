"""PEER: a layer of very many experts of one neuron each.

Paper: He, arXiv 2407.04153.
Equations: y = sum over heads and their k best experts of gate x act(u . x) v.
Config: `model.moe: {num_experts: 1048576, expert_ffn_dim: 1, router: {name: peer}}`.
Differs: experts are divided over `ep` by their first sub-key. A token uses more experts than there
    are ranks, so it is sent to each of them once and their sums are added, which is less than a row
    for each slot.
Shapes: T tokens, D model dim, n sub-keys, K slots per token, P ranks of `ep`, N tokens of them all.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.moe.base import SparseLayer
from dmoe.moe.routers.product_key import PeerConfig, ProductKeyRouter
from dmoe.moe.routing import MoEContext
from dmoe.moe.stats import MoEOutput, MoEStats
from dmoe.ops.neuron_bag import NeuronActivation, neuron_bag
from dmoe.parallel import ParallelDims, all_to_all_rows


class PeerLayer(SparseLayer):
    """Looks up a few of n x n neurons.

    Args:
        config: the `model.moe.router` section.
        num_experts: n x n.
        dim: D.
        dims: the layout; this rank holds the experts of its share of the first sub-keys.
    """

    router: ProductKeyRouter

    def __init__(self, config: PeerConfig, *, num_experts: int, dim: int, dims: ParallelDims):
        super().__init__()
        self.num = config.num_shards(num_experts)
        self.owned, self.group = dims.local_experts(self.num), dims.ep_group
        self.router = ProductKeyRouter(config, dim=dim, num_experts=num_experts)
        self.experts = SingleNeurons(
            num_local=len(self.owned), num=self.num, dim=dim, activation=config.activation
        )
        # For a layer that is used alone; a model draws its weights from its own seed.
        for name, parameter in self.named_parameters():
            std = initial_std(name, parameter.shape)
            if parameter.ndim > 1:  # a norm has its own
                nn.init.normal_(parameter, std=0.02 if std is None else std)

    def forward(self, x_TD: Tensor, context: MoEContext) -> tuple[Tensor, MoEOutput]:
        """Return y_TD, without the residual, and statistics; there are no losses."""
        ids_TK, gates_TK, sums = self.router(x_TD, context)
        y_TD = self._look_up(x_TD, ids_TK, gates_TK)
        used = ids_TK[ids_TK >= 0]
        counts_n = torch.bincount(used // self.num, minlength=self.num)
        return y_TD, MoEOutput({}, MoEStats(counts_n, counts_n.new_zeros(()), sums))

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 at least, whatever the precision of the model."""
        return [self.router.gate]

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Let the router adapt to a training step, unless it was one of nothing but padding."""
        if counts_E.any():
            self.router.end_step(means or {})

    def _look_up(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        if self.group is None:
            return self.experts(x_TD, ids_TK, gates_TK)
        ranks, num_tokens = self.group.size(), len(x_TD)
        sent = torch.full((ranks,), num_tokens, device=x_TD.device)
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent, group=self.group)
        own, theirs = [num_tokens] * ranks, arriving.tolist()
        x_ND, ids_NK, gates_NK = (
            all_to_all_rows(rows.repeat(ranks, 1), own, theirs, self.group)
            for rows in (x_TD, ids_TK, gates_TK)
        )
        ids_NK = ids_NK - self.owned.start * self.num
        elsewhere_NK = (ids_NK < 0) | (ids_NK >= len(self.owned) * self.num)
        y_ND = self.experts(x_ND, ids_NK.masked_fill(elsewhere_NK, -1), gates_NK)
        y_PTD = all_to_all_rows(y_ND, theirs, own, self.group)
        return y_PTD.view(ranks, *x_TD.shape).sum(0)


class SingleNeurons(nn.Module):
    """The neurons of a rank, by first and second sub-key."""

    def __init__(self, *, num_local: int, num: int, dim: int, activation: NeuronActivation):
        super().__init__()
        self.activation = activation
        self.w_in_nnD = nn.Parameter(torch.empty(num_local, num, dim))
        self.w_out_nnD = nn.Parameter(torch.empty(num_local, num, dim))

    def forward(self, x_ND: Tensor, ids_NK: Tensor, gates_NK: Tensor) -> Tensor:
        """Return (N, D) the sum of each token's neurons; ids are those within this rank."""
        w_in_ED, w_out_ED = self.w_in_nnD.flatten(0, 1), self.w_out_nnD.flatten(0, 1)
        # Rows are looked up, so a narrow copy of all the weights would cost more than it saves.
        return neuron_bag(
            x_ND, ids_NK, gates_NK.to(w_in_ED.dtype), w_in_ED, w_out_ED, self.activation
        )


def initial_std(name: str, shape: torch.Size) -> float | None:
    """Return the standard deviation of an initial weight of PEER; None for others.

    Tokens and the halves of queries have a mean square of 1, and so then have scores and
    pre-activations. Few neurons make up an output, so theirs are as large.
    """
    if name.endswith(("sub_keys", "w_in_nnD", "w_out_nnD")):
        return shape[-1] ** -0.5
    return None
