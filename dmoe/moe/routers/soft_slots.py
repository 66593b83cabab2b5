"""Soft MoE: experts work on slots, weighted means of the tokens of a sequence.

Paper: Puigcerver et al., arXiv 2308.00951.
Equations: slots are D^T X and tokens are C Y, where D and C are softmaxes of one matrix of logits X
    Phi, over tokens and over slots. No token is sent or dropped, and everything is
    differentiable.
Config: `model.moe.router: {name: soft_moe, slots: 64}`; its layer is `dmoe.moe.soft`.
Differs: padding has no part. Not causal: every slot is a mean over the whole sequence.
Shapes: B sequences, S tokens of one, T = B S, D model dim, X slots of a sequence.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from dmoe.config.base import ConfigError
from dmoe.moe.base import SparseLayer
from dmoe.moe.routers.base import RouterSection
from dmoe.ops import Activation
from dmoe.parallel import ParallelDims

if TYPE_CHECKING:  # the section that holds this one
    from dmoe.moe.config import MoEConfig


class SoftMoEConfig(RouterSection):
    """Experts process slots, each a mean of all tokens of a sequence: for encoders."""

    takes_k: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True
    mixes_sequences: ClassVar[bool] = True
    warning: ClassVar[str] = (
        "model.moe.router.name = soft_moe is not causal: a slot is a mean over the whole sequence, "
        "later tokens too, so the loss of a decoder is too low, and it cannot write text as it was "
        "trained. Use it for encoders and for comparison."
    )

    name: Literal["soft_moe"]
    """Slots that are means of tokens."""
    slots: PositiveInt = 1
    """Slots of each expert in a sequence. A layer costs as much as if a token had slots x experts /
    tokens of a sequence."""
    normalize: bool = True
    """Bring tokens and slot vectors to length 1 before their product, times a learnt scale."""

    def limits(self) -> dict[str, float | None]:
        """Return nothing: there is no number to check."""
        return {}

    def nominal_k(self, num_experts: int) -> float:
        """Return all experts: what a token gets depends on every one."""
        return num_experts

    def most_k(self, num_experts: int) -> int:
        """Return all experts."""
        return num_experts

    def passes(self, num_experts: int, seq_len: int) -> float:
        """Return how often a row goes through an expert, per token."""
        return num_experts * self.slots / seq_len

    def check(self, moe: "MoEConfig") -> None:
        """Check that no other key is idle.

        Raises:
            ConfigError: a section is there that acts on tokens which are sent to experts.
        """
        for key, given in (
            ("capacity", moe.capacity is not None),
            ("losses", bool(moe.losses.weights())),
        ):
            if given:
                raise ConfigError(
                    f"{key} is for tokens that are sent to experts, but with router.name = "
                    f"soft_moe none is: leave {key} out",
                    key=key,
                )

    def build_layer(
        self, moe: "MoEConfig", *, dim: int, activation: Activation, dims: ParallelDims
    ) -> SparseLayer:
        """Build the layer."""
        from dmoe.moe.soft import SoftMoELayer  # it is built from this section

        return SoftMoELayer(moe, self, dim=dim, activation=activation, dims=dims)


class SlotRouter(nn.Module):
    """Holds what `SlotGate` computes with, under the name that routers give it."""

    def __init__(self, config: SoftMoEConfig, *, dim: int, num_slots: int):
        super().__init__()
        self.gate = SlotGate(config, dim=dim, num_slots=num_slots)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of tokens in slots and of slots in tokens, (B, S, X) each.

        Each slot's tokens sum to 1, and each token's slots; padding has and gives nothing.
        """
        logits_BSX = self.gate(x_BSD)
        padding_BS1 = ~valid_BS[:, :, None]
        # Finite, as a sequence of nothing but padding would else divide 0 by 0.
        dispatch_BSX = logits_BSX.masked_fill(padding_BS1, -1e30).softmax(1)
        combine_BSX = logits_BSX.softmax(2)
        return dispatch_BSX.masked_fill(padding_BS1, 0), combine_BSX.masked_fill(padding_BS1, 0)


class SlotGate(nn.Module):
    """From a token to its logits with all slots, in float32 at least."""

    def __init__(self, config: SoftMoEConfig, *, dim: int, num_slots: int):
        super().__init__()
        self.normalize = config.normalize
        self.weight = nn.Parameter(torch.empty(num_slots, dim))
        self.scale = nn.Parameter(torch.ones(1))
        # For a layer that is used alone; a model draws its weights from its own seed.
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return (B, S, X)."""
        x_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
        weight_XD = self.weight.to(x_BSD.dtype)
        if self.normalize:
            x_BSD = F.normalize(x_BSD, dim=-1)
            weight_XD = self.scale.to(x_BSD.dtype) * F.normalize(weight_XD, dim=-1)
        return F.linear(x_BSD, weight_XD)
