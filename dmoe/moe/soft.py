"""The layer of Soft MoE: mix tokens into slots, run the experts, mix back.

Paper: Puigcerver et al., arXiv 2308.00951.
Equations: those of `dmoe.moe.routers.soft_slots`, with the experts between.
Config: `model.moe.router: {name: soft_moe, slots: 64}`.
Differs: slots are rows like any others: the dispatcher of the ordinary layer brings each to its
    expert, on whatever rank that is.
Shapes: B sequences, S tokens of one, T = B S, D model dim, E experts, X slots of a sequence.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmoe.moe.base import SparseLayer
from dmoe.moe.dispatch import build_dispatcher
from dmoe.moe.experts import FeedForward, GroupedExperts
from dmoe.moe.routers.soft_slots import SlotRouter, SoftMoEConfig
from dmoe.moe.routing import MoEContext, make_routing
from dmoe.moe.stats import MoEOutput, MoEStats
from dmoe.ops import Activation
from dmoe.parallel import ParallelDims

if TYPE_CHECKING:  # the section that holds the router's
    from dmoe.moe.config import MoEConfig


class SoftMoELayer(SparseLayer):
    """Experts that each process a few slots of every sequence."""

    router: SlotRouter

    def __init__(
        self,
        config: "MoEConfig",
        section: SoftMoEConfig,
        *,
        dim: int,
        activation: Activation,
        dims: ParallelDims,
    ):
        super().__init__()
        self.config, self.num_experts, self.slots = config, config.num_networks, section.slots
        self.router = SlotRouter(section, dim=dim, num_slots=self.num_experts * self.slots)
        self.dispatcher = build_dispatcher(
            config.dispatch, num_experts=self.num_experts, dims=dims, backend=config.backend
        )
        self.experts = GroupedExperts(
            num_local=len(dims.local_experts(self.num_experts)),
            dim=dim,
            ffn_dim=config.expert_width,
            activation=activation,
            backend=config.backend,
        )
        self.shared_experts: FeedForward | None = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.expert_width
            self.shared_experts = FeedForward(dim=dim, ffn_dim=width, activation=activation)

    def forward(self, x_TD: Tensor, context: MoEContext) -> tuple[Tensor, MoEOutput]:
        """Return y_TD, without the residual, and statistics; there are no losses."""
        x_BSD = x_TD.unflatten(0, (-1, context.seq_len))
        valid_BS = torch.ones_like(x_BSD[:, :, 0], dtype=torch.bool)
        if context.valid_T is not None:
            valid_BS = context.valid_T.view_as(valid_BS)
        dispatch_BSX, combine_BSX = self.router(x_BSD, valid_BS)
        slots_BXD = dispatch_BSX.to(x_TD.dtype).transpose(1, 2) @ x_BSD
        y_BXD, counts_E = self._process(slots_BXD, valid_BS.any(1))
        y_TD = (combine_BSX.to(x_TD.dtype) @ y_BXD).flatten(0, 1)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD, MoEOutput({}, MoEStats(counts_E, counts_E.new_zeros(()), {}))

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 at least, whatever the precision of the model."""
        return [self.router.gate]

    def _process(self, slots_BXD: Tensor, used_B: Tensor) -> tuple[Tensor, Tensor]:
        """Run the experts on their slots; sequences of nothing but padding have none."""
        num_sequences, num_slots = slots_BXD.shape[:2]
        expert_X = torch.arange(num_slots, device=slots_BXD.device) // self.slots
        ids_BX = torch.where(used_B[:, None], expert_X, -1)
        wide = torch.promote_types(slots_BXD.dtype, torch.float32)
        rows, none_E = num_sequences * num_slots, slots_BXD.new_zeros(self.num_experts, dtype=wide)
        nothing = none_E.expand(rows, -1)
        routing = make_routing(nothing, nothing, ids_BX.view(rows, 1), nothing.new_ones(rows, 1))
        sent, counts_e, handle = self.dispatcher.dispatch(slots_BXD.flatten(0, 1), routing)
        y_RD = self.dispatcher.combine(self.experts(sent, counts_e), handle)
        return y_RD.view_as(slots_BXD), routing.counts_E
