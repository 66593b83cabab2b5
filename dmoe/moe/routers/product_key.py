"""Product keys: which of a million experts a token looks up.

Paper: PEER, He, arXiv 2407.04153.
Equations: expert (i, j) of n x n has the key (c_i, c'_j), two of 2 n sub-keys, and its score is
    that of the halves of a query with them, summed. Several heads query the same keys and experts;
    the gates of a head are a softmax over its k best.
Config: `model.moe: {num_experts: 1048576, expert_ffn_dim: 1, router: {name: peer, heads: 8, top_k:
    16}}`; the layer is `dmoe.moe.peer`.
Differs: queries are normed by RMSNorm unless `query_norm: batch` asks for the paper's norm.
Shapes: T tokens, H heads, Q half a query, n sub-keys.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from dmoe.config.base import ConfigError
from dmoe.moe.base import SparseLayer
from dmoe.moe.routers.base import RouterSection
from dmoe.moe.routers.query_norm import QueryBatchNorm, moments
from dmoe.moe.routing import MoEContext
from dmoe.ops import router_gate
from dmoe.ops.activation import Activation
from dmoe.ops.neuron_bag import NeuronActivation
from dmoe.ops.product_keys import scores_of_pairs, top_k_pairs
from dmoe.parallel import ParallelDims

if TYPE_CHECKING:  # the section that holds this one
    from dmoe.moe.config import MoEConfig


class PeerConfig(RouterSection):
    """PEER: very many experts of one neuron, looked up by product keys; `expert_ffn_dim` is 1."""

    takes_k: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True
    is_grouped: ClassVar[bool] = False
    shards: ClassVar[str] = "first sub-keys"

    name: Literal["peer"]
    """Heads that look up single neurons by product keys."""
    heads: PositiveInt = 8
    """Queries of a token; all look up the same experts."""
    top_k: PositiveInt = 16
    """Experts of a head."""
    query_dim: PositiveInt | None = None
    """Width of a query, an even number; null for the model's width."""
    query_norm: Literal["rms", "batch", "none"] = "rms"
    """"rms" brings each half of a query to a mean square of 1. "batch" is the batch norm of the
    paper, over the tokens of a micro-batch: in training a token's experts then depend a little on
    the tokens beside and after it, at inference on running moments."""
    activation: NeuronActivation = "gelu"
    """Of a neuron."""

    @property
    def fixed_k(self) -> int:
        """Experts of every token, over all heads."""
        return self.heads * self.top_k

    def limits(self) -> dict[str, float | None]:
        """Return nothing: `check` has the closer limit."""
        return {}

    def num_shards(self, num_experts: int) -> int:
        """Return n: the experts that share a first sub-key stay together."""
        return round(num_experts**0.5)

    def num_counted(self, num_experts: int) -> int:
        """Return n: their slots are counted together, as a million counts tell nobody anything."""
        return self.num_shards(num_experts)

    def check(self, moe: "MoEConfig") -> None:
        """Check the number and the width of the experts, and that no other key is idle.

        Raises:
            ConfigError: they do not fit, or a section is there that acts on other experts.
        """
        num = self.num_shards(moe.experts)
        if num * num != moe.experts:
            raise ConfigError(
                f"num_experts = {moe.experts} is no square, but router.name = peer finds experts "
                f"by pairs of sub-keys: take {num * num} or {(num + 1) ** 2}",
                key="num_experts",
            )
        if self.top_k > num:
            raise ConfigError(
                f"router.top_k = {self.top_k} is more than the {num} sub-keys of num_experts = "
                f"{moe.experts}: lower it",
                key="router.top_k",
            )
        if self.query_dim is not None and self.query_dim % 2:
            raise ConfigError(
                f"router.query_dim = {self.query_dim} is odd, but a query has two halves",
                key="router.query_dim",
            )
        if moe.expert_ffn_dim != 1:
            raise ConfigError(
                f"expert_ffn_dim = {moe.expert_ffn_dim}, but with router.name = peer an expert is "
                f"one neuron: set it to 1",
                key="expert_ffn_dim",
            )
        for key, given in (
            ("capacity", moe.capacity is not None),
            ("num_shared_experts", moe.num_shared_experts > 0),
            ("losses", bool(moe.losses.weights())),
            ("backend", moe.backend != "auto"),
        ):
            if given:
                raise ConfigError(
                    f"{key} is for experts that tokens are sent to, but with router.name = peer "
                    f"tokens look up single neurons: leave {key} out",
                    key=key,
                )

    def kept_width(self, dim: int, *, exchanged: bool) -> int:
        """Return the numbers that a token keeps for the backward pass: queries, slots, exchange."""
        queries = 2 * self.heads * (self.query_dim or dim)
        return queries + 2 * self.fixed_k + (dim if exchanged else 0)

    def build_layer(
        self, moe: "MoEConfig", *, dim: int, activation: Activation, dims: ParallelDims
    ) -> SparseLayer:
        """Build the layer."""
        from dmoe.moe.peer import PeerLayer  # it is built from this section

        return PeerLayer(self, num_experts=moe.experts, dim=dim, dims=dims)


class LookUp(NamedTuple):
    """What the tokens of a micro-batch look up."""

    ids_TK: Tensor
    """(T, H k) int64 experts, -1 for padding."""
    gates_TK: Tensor
    """(T, H k) gates; those of a head sum to 1."""
    sums: dict[str, Tensor]
    """As `MoEStats.sums`, for `ProductKeyRouter.end_step`."""


class ProductKeyRouter(nn.Module):
    """Chooses a token's experts and their gates."""

    def __init__(self, config: PeerConfig, *, dim: int, num_experts: int):
        super().__init__()
        self.config = config
        num = config.num_shards(num_experts)
        self.gate = ProductKeyGate(config, dim=dim, num=num)

    def forward(self, x_TD: Tensor, context: MoEContext) -> LookUp:
        """Return what each token of `x_TD`, (T, D), looks up."""
        first_THn, second_THn, sums = self.gate(x_TD, context)
        first_Rn, second_Rn = first_THn.flatten(0, 1), second_THn.flatten(0, 1)
        ids_Rk = context.decide(
            "expert_ids", lambda: top_k_pairs(first_Rn, second_Rn, self.config.top_k)
        )
        gates_Rk = scores_of_pairs(first_Rn, second_Rn, ids_Rk).softmax(-1)
        ids_TK, gates_TK = (
            rows.view(len(x_TD), self.config.fixed_k) for rows in (ids_Rk, gates_Rk)
        )
        if context.valid_T is not None:
            padding_T1 = ~context.valid_T[:, None]
            ids_TK, gates_TK = (
                ids_TK.masked_fill(padding_T1, -1),
                gates_TK.masked_fill(padding_T1, 0),
            )
        return LookUp(ids_TK, gates_TK, sums)

    def end_step(self, means: Mapping[str, Tensor]) -> None:
        """Adapt to a training step, of whose tokens `means` has the means of `LookUp.sums`."""
        if self.gate.query_norm is not None:
            self.gate.query_norm.end_step(means)


class ProductKeyGate(nn.Module):
    """From a token to the scores of both halves of its queries with all sub-keys, in float32."""

    def __init__(self, config: PeerConfig, *, dim: int, num: int):
        super().__init__()
        self.config = config
        self.width = (config.query_dim or dim) // 2
        self.query = nn.Parameter(torch.empty(2 * config.heads * self.width, dim))
        self.sub_keys = nn.Parameter(torch.empty(2, num, self.width))
        self.query_norm: QueryBatchNorm | None = None
        if config.query_norm == "batch":
            self.query_norm = QueryBatchNorm(len(self.query))

    def forward(
        self, x_TD: Tensor, context: MoEContext
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return two (T, H, n), and sums for the end of the step."""
        query_TF, sums = router_gate(x_TD, self.query), {}
        if self.query_norm is not None:
            if context.training:
                sums = moments(query_TF, context)
            query_TF = self.query_norm(query_TF, context)
        query_THQ = query_TF.view(len(x_TD), self.config.heads, 2, self.width)
        if self.config.query_norm == "rms":
            query_THQ = F.rms_norm(query_THQ, (self.width,), eps=1e-6)
        first_THQ, second_THQ = query_THQ.unbind(2)
        keys = self.sub_keys.to(query_THQ.dtype)
        return first_THQ @ keys[0].T, second_THQ @ keys[1].T, sums
