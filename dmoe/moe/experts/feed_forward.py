"""One feed-forward network: the dense layers of a model, and the shared experts of a MoE layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.ops import Activation, Linear


class FeedForward(nn.Module):
    """W_down act(W_up x), with the gate and up maps of SwiGLU stored as one matrix."""

    def __init__(self, *, dim: int, ffn_dim: int, activation: Activation, bias: bool = False):
        super().__init__()
        self.activation = activation
        width = 2 * ffn_dim if activation == "swiglu" else ffn_dim
        self.up_proj = Linear(dim, width, bias=bias)
        self.down_proj = Linear(ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden = self.up_proj(x)
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        elif self.activation == "gelu":
            hidden = F.gelu(hidden, approximate="tanh")
        else:
            hidden = F.relu(hidden)
        return self.down_proj(hidden)
