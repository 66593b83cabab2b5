"""What is measured: the shapes of the roofline, and one problem with its tensors and its routing.

Shapes: T tokens, K experts a token, E experts, D model dim, F expert dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """The sizes of a layer and of its batch."""

    name: str
    num_tokens: int
    dim: int
    ffn_dim: int
    num_experts: int
    top_k: int

    @property
    def forward_flop(self) -> int:
        """Floating-point operations of the forward pass; forward and backward are three times."""
        return 6 * self.num_tokens * self.top_k * self.dim * self.ffn_dim


SHAPES = (
    Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
    Shape("OLMoE-1B-7B", 32768, 2048, 1024, 64, 8),
    Shape("SonicMoE 7B, fine-grained", 24576, 1536, 256, 128, 8),
    Shape("SonicMoE bench", 32768, 4096, 1024, 128, 8),
    Shape("SonicMoE sparse", 16384, 4096, 1024, 256, 8),
    Shape("fine, n = 256", 32768, 4096, 256, 256, 8),
    Shape("Qwen3-30B-A3B, T = 4096", 4096, 2048, 768, 128, 8),
)
TINY = Shape("tiny", 37, 32, 24, 5, 2)


@dataclass
class Problem:
    """Random tensors, as zeros would make a GPU faster than it is; all contenders share them."""

    shape: Shape
    x_TD: Tensor
    logits_TE: Tensor
    """Of the router, in float32."""
    ids_TK: Tensor
    """Experts of each token: those of the largest logits."""
    weights_TK: Tensor
    """Their float32 gates, summing to 1."""
    w_up_EHD: Tensor
    """Gate rows, then up rows."""
    w_down_EDF: Tensor
    dy_TD: Tensor

    @classmethod
    def make(
        cls, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> "Problem":
        """Draw a problem from a seed."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int, std: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * std).to(dtype)

        logits = torch.randn(
            shape.num_tokens, shape.num_experts, generator=generator, device=device
        )
        gates, ids = logits.softmax(-1).topk(shape.top_k)
        return cls(
            shape,
            draw(shape.num_tokens, shape.dim),
            logits,
            ids,
            gates / gates.sum(-1, keepdim=True),
            draw(shape.num_experts, 2 * shape.ffn_dim, shape.dim, std=shape.dim**-0.5),
            draw(shape.num_experts, shape.dim, shape.ffn_dim, std=shape.ffn_dim**-0.5),
            draw(shape.num_tokens, shape.dim),
        )

    def leaves(self) -> list[Tensor]:
        """Return x, gates and weights as leaves that ask for a gradient."""
        return self._leaves(self.weights_TK)

    def layer_leaves(self) -> list[Tensor]:
        """Return the same with logits in place of the gates, for a layer with its router."""
        return self._leaves(self.logits_TE)

    def _leaves(self, routing: Tensor) -> list[Tensor]:
        # Not copies: weights in float32 may be a sixth of a GPU's memory.
        tensors = (self.x_TD, routing, self.w_up_EHD, self.w_down_EDF)
        return [t.detach().requires_grad_() for t in tensors]

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same numbers in a dtype; logits and gates stay in float32."""
        x, up, down, dy = (
            t.to(dtype) for t in (self.x_TD, self.w_up_EHD, self.w_down_EDF, self.dy_TD)
        )
        return Problem(self.shape, x, self.logits_TE, self.ids_TK, self.weights_TK, up, down, dy)
