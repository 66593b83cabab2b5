"""Nested mixtures: experts that are MoE layers themselves, to any depth.

Paper: Jordan and Jacobs, 1994, "Hierarchical mixtures of experts and the EM algorithm".
Equations: y = sum_e g_e(x) layer_e(x), where each layer_e is again such a sum.
Config: `model.moe.expert_layer`, a section like `model.moe` for the layers inside.
Differs: gates may be sparse, by any router, and levels may have shared experts, capacity and losses
    of their own. All is trained by the model's loss, not by EM.
Shapes: T tokens, D model dim, E experts, K slots per token, R rows that came to an expert, n counts
    of a layer inside.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from dmoe.moe.base import SparseLayer
from dmoe.moe.config import MoEConfig
from dmoe.moe.layer import RoutedLayer
from dmoe.moe.routing import MoEContext, Routing
from dmoe.moe.stats import Within, within_of
from dmoe.ops import Activation
from dmoe.parallel import ParallelDims


class LayeredMoELayer(RoutedLayer):
    """Experts that are MoE layers.

    Each runs on the rows of this rank that came to it, and divides its own experts over `ep`; so
    ranks call all of them, one after the other, also without rows. Where the levels are but routers
    over experts of one kind, `router.name: nested` does the same in one dispatch.
    """

    def __init__(self, config: MoEConfig, *, dim: int, activation: Activation, dims: ParallelDims):
        super().__init__(config, dim=dim, activation=activation, dims=dims)
        assert config.expert_layer is not None
        self.inside = config.expert_layer
        # By this name, as parameters under `.experts.` are those that ep divides.
        self.layers = nn.ModuleList(
            self.inside.build(dim=dim, activation=activation, dims=dims)
            for _ in range(config.num_networks)
        )

    def run_experts(
        self, x_TD: Tensor, served: Routing, context: MoEContext
    ) -> tuple[Tensor, Within]:
        """Run each layer on its tokens, and sum what they return, times gates."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD, outputs, num_rows = torch.zeros_like(x_TD, dtype=wide), [], []
        for expert, layer in enumerate(self.layers):
            token_R, slot_R = (served.expert_ids_TK == expert).nonzero().unbind(1)
            y_RD, output = layer(x_TD[token_R], self._context_of(expert, token_R, context))
            gates_R1 = served.weights_TK[token_R, slot_R, None]
            y_TD = y_TD.index_add(0, token_R, y_RD.to(wide) * gates_R1.to(wide))
            outputs.append(output)
            num_rows.append(len(token_R))
        rows_E = torch.tensor(num_rows, device=x_TD.device)
        return y_TD.to(x_TD.dtype), within_of(outputs, rows_E)

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 at least: the gates of all levels."""
        inner = [m for layer in self._inner() for m in layer.wide_modules]
        return [*super().wide_modules, *inner]

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Let the routers of all levels adapt, each to its own tokens."""
        assert means is not None, "the slots of the layers inside"
        own = {name: mean for name, mean in means.items() if not name.startswith("within_")}
        super().end_step(counts_E, num_tokens, own)
        parts = {
            name.removeprefix("within_"): mean.view(len(self.layers), -1)
            for name, mean in means.items()
            if name.startswith("within_")
        }
        rows_E = (parts.pop("rows").squeeze(1) * num_tokens).round().long()
        slots_En = (parts.pop("slots") * num_tokens).round().long()
        num_counted = self.inside.num_counted
        for expert, layer in enumerate(self._inner()):
            num = int(rows_E[expert])
            if not num:  # a layer that no token came to has nothing to adapt to
                continue
            # Means over all tokens become those over the tokens that came here.
            mine = {name: mean[expert] * (num_tokens / num) for name, mean in parts.items()}
            if self.inside.expert_layer is not None:
                mine["within_slots"] = slots_En[expert, num_counted:] / num
            layer.end_step(slots_En[expert, :num_counted], num, mine)

    def _inner(self) -> list[SparseLayer]:
        return cast(list[SparseLayer], list(self.layers))

    def _context_of(self, expert: int, token_R: Tensor, context: MoEContext) -> MoEContext:
        inside = context.inside(f"expert {expert}", token_R)
        if context.counts_LE is None:
            return inside
        size = self.inside.num_slots_counted
        first = self.config.num_counted + expert * size
        return replace(inside, counts_LE=context.counts_LE[:, first : first + size])
