"""The routed experts of a layer: feed-forward networks of one shape, run as grouped GEMMs.

Shapes: e local experts, D model dim, F expert dim, R routed rows. A rank holds the slice of experts
that its expert-parallel place gives it; the engine may shard dim 0 further over equal ranks.
"""

import torch
from torch import Tensor, nn

from dmoe.moe.dispatch import Rows
from dmoe.ops import Activation, Backend, ExpertDtype, expert_ffn, expert_ffn_loop


class GroupedExperts(nn.Module):
    """Weights K-major, in the layout (E, 2F, D) and (E, D, F) that Hugging Face v5 uses too."""

    def __init__(
        self,
        *,
        num_local: int,
        dim: int,
        ffn_dim: int,
        activation: Activation,
        backend: Backend = "auto",
        recompute: bool = False,
        dtype: ExpertDtype = "same",
    ):
        super().__init__()
        self.activation, self.backend, self.recompute = activation, backend, recompute
        self.dtype = dtype
        if activation == "swiglu":
            self.w_gate_up_E2FD = nn.Parameter(torch.empty(num_local, 2 * ffn_dim, dim))
        else:
            self.w_up_EFD = nn.Parameter(torch.empty(num_local, ffn_dim, dim))
        self.w_down_EDF = nn.Parameter(torch.empty(num_local, dim, ffn_dim))
        # For a layer that is used alone; a model draws its weights from its own seed.
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, rows: Rows, counts_e: Tensor, factors_RF: Tensor | None = None) -> Tensor:
        """Return y_ND, for each source the sum of its rows' outputs times their gates.

        `factors_RF`, if there are any, multiply what each row's neurons make.
        """
        w_up = self.w_gate_up_E2FD if self.activation == "swiglu" else self.w_up_EFD
        if factors_RF is not None:  # for a loop, which knows no rows past the counts
            num_rows = len(factors_RF)
            rows = Rows(rows.x_ND, rows.map.head(num_rows), rows.weights_R[:num_rows])
        arguments = (rows.x_ND, rows.map, rows.weights_R, counts_e, w_up, self.w_down_EDF)
        if factors_RF is not None:
            return expert_ffn_loop(*arguments, activation=self.activation, factors_RF=factors_RF)
        return expert_ffn(
            *arguments,
            activation=self.activation,
            backend=self.backend,
            recompute=self.recompute,
            dtype=self.dtype,
        )
