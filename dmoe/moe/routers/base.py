"""What every router is, and the linear map that most of them score with.

Shapes: T tokens, D model dim, E experts.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.base import ConfigModel
from dmoe.config.plugins import OpenChoice
from dmoe.moe.base import SparseLayer
from dmoe.moe.routing import MoEContext, Routing
from dmoe.ops import Activation, Backend, router_gate
from dmoe.parallel import ParallelDims

if TYPE_CHECKING:  # the section that holds a router's
    from dmoe.moe.config import MoEConfig

RouterPrecision = Literal["fp32", "bf16"]


class RouterSection(ConfigModel):
    """What a model knows of its router before it is built; the base of every router's section."""

    name: str
    """By which it is chosen."""

    takes_k: ClassVar[bool] = True
    """Whether the context may say how many experts a token uses; not where experts choose."""
    takes_gate_threshold: ClassVar[bool] = False
    """Whether experts are chosen by score, so that a token may skip those of small score, or take a
    random subset of its best."""
    balances_itself: ClassVar[bool] = False
    """Whether the router has means of its own against uneven load; no load-balancing loss is then
    on unless it is given."""
    is_grouped: ClassVar[bool] = True
    """Whether the experts are networks that grouped GEMMs run."""
    mixes_sequences: ClassVar[bool] = False
    """Whether tokens of a sequence are mixed, so that a layer must see all of them."""
    shards: ClassVar[str] = "parts"
    """What `num_shards` counts where it is not the experts, to be told."""
    warning: ClassVar[str] = ""
    """What the user must know before training or using a model; told at start."""

    @property
    def fixed_k(self) -> int | None:
        """Experts of every token where the context does not say: `top_k`, if the section has it.

        None where tokens differ.
        """
        return getattr(self, "top_k", None)

    def limits(self) -> dict[str, float | None]:
        """Return what must not be above the number of experts, by the keys of `model.moe`."""
        return {"router.top_k": self.fixed_k}

    def check(self, moe: "MoEConfig") -> None:
        """Check what depends on the rest of `model.moe`.

        Raises:
            ConfigError: it does not fit; the key is one of `model.moe`.
        """

    def nominal_k(self, num_experts: int) -> float:
        """Return the experts per token by which a model is counted, where it has `num_experts`."""
        assert self.fixed_k is not None, "where tokens differ, the router tells its own"
        return self.fixed_k

    def most_k(self, num_experts: int) -> int:
        """Return the most experts that a token may have where the context does not say."""
        assert self.fixed_k is not None, "where tokens differ, the router tells its own"
        return self.fixed_k

    def loss_weights(self) -> dict[str, float]:
        """Return the weights of the losses that are the router's own (`Routing.losses`)."""
        return {}

    def passes(self, num_experts: int, seq_len: int) -> float:
        """Return how often a row goes through an expert, per token, in sequences of `seq_len`."""
        return self.nominal_k(num_experts)

    @property
    def stands_for_layer(self) -> bool:
        """Whether the section builds a whole layer, not a router of a `MoELayer`."""
        return type(self).build_layer is not RouterSection.build_layer

    def num_shards(self, num_experts: int) -> int:
        """Return into how many equal parts expert parallelism may divide the experts."""
        return num_experts

    def num_counted(self, num_experts: int) -> int:
        """Return the length of the counts of slots that the layer reports."""
        return num_experts

    def kept_width(self, dim: int, *, exchanged: bool) -> int:
        """Return the numbers that a token keeps for backward where no grouped GEMM runs experts.

        Args:
            dim: of the model.
            exchanged: experts are on several ranks.
        """
        raise NotImplementedError

    def build_layer(
        self, moe: "MoEConfig", *, dim: int, activation: Activation, dims: ParallelDims
    ) -> SparseLayer | None:
        """Build the whole layer where it is not a `MoELayer` around the router; else None."""
        return None

    def build(self, *, dim: int, num_experts: int) -> "Router":
        """Build the router."""
        raise NotImplementedError


RouterConfig = Annotated[
    RouterSection, OpenChoice("dmoe.routers", RouterSection, "dmoe.moe.routers:ROUTERS")
]
"""Any router's section, chosen by `name`: one of `ROUTERS`, or a plug-in's."""


class Router(nn.Module):
    """Decides which experts each token goes to, and with what weights.

    All but a tree of routers are alike: `gate` makes logits, `select` the (T, K) ids of the
    experts, -1 where unused, and `forward` the gates of these. The choice is made inside
    `context.decide`.

    Its submodule `gate` holds its parameters and computes in float32 at least.
    """

    gate: nn.Module
    """Its parameters start as those of the model do, at zero where the module that holds them has
    `starts_at_zero`."""
    backend: Backend = "auto"
    """That of the layer: where it is "triton", a router may use kernels."""

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 at least, whatever the precision of the model."""
        has_any = next(self.gate.parameters(), None) is not None
        return [self.gate] if has_any else []

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D)."""
        raise NotImplementedError

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Adapt to a training step.

        Args:
            counts_E: (E,) slots that each expert got over the global batch.
            num_tokens: tokens of the global batch that are not padding.
            means: (E,) each, the sums by expert of `Routing.sums` over the global batch, a token's
                mean; None where nothing is known of them.
        """


class RouterGate(nn.Module):
    """The linear map from a token to its logits, computed in float32 at least.

    Args:
        dim: of a token.
        num_experts: logits of a token.
        precision: "bf16" rounds token, weight and logits to bfloat16 all the same.
    """

    def __init__(self, dim: int, num_experts: int, precision: RouterPrecision = "fp32"):
        super().__init__()
        self.precision = precision
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        # For a layer that is used alone; a model draws its weights from its own seed.
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return (T, E) logits."""
        if self.precision == "bf16":
            return F.linear(x_TD.bfloat16(), self.weight.bfloat16()).to(self.weight.dtype)
        return router_gate(x_TD, self.weight)
