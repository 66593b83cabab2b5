"""Hash layers: the word decides the expert, once and for all.

Paper: Roller et al., arXiv 2106.04426.
Equations: a fixed random hash of the token's id in the vocabulary, another one in each layer, and
    in each router or layer within another one; nothing is learned, and the gates are even.
Config: `model.moe.router: {name: hash}`.
Differs: a word may have several experts; the balanced hash of the paper is not there.
Shapes: T tokens, D model dim, E experts, K slots per token.
"""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from dmoe.moe.routers.base import Router, RouterSection
from dmoe.moe.routers.choice import choose
from dmoe.moe.routing import MoEContext, Routing, make_routing
from dmoe.rng import stream_key, token_uniform


class HashConfig(RouterSection):
    """Each word has experts of its own."""

    balances_itself: ClassVar[bool] = True

    name: Literal["hash"]
    """A fixed hash of the token's id."""
    top_k: PositiveInt = 1
    """Experts per token."""
    hash_seed: int = 0
    """Chooses the hash. It belongs to the model, so it is not the seed of the run."""

    def build(self, *, dim: int, num_experts: int) -> "HashRouter":
        """Build the router."""
        return HashRouter(self, num_experts=num_experts)


class HashRouter(Router):
    """Draws the experts of a token from its id."""

    def __init__(self, config: HashConfig, *, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.gate = nn.Identity()

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        """Route each token of `x_TD`, (T, D), by its word alone."""
        assert context.vocab_ids_T is not None, "hash routing needs the ids of the words"
        key = stream_key(self.config.hash_seed, "hash_router", context.layer, *context.path)
        draws_TE = token_uniform(key, context.vocab_ids_T, self.num_experts)
        draws_TE = draws_TE.to(torch.promote_types(x_TD.dtype, torch.float32))
        ids_TK = context.decide("expert_ids", lambda: self.select(draws_TE, context))
        used_TK = (ids_TK >= 0).to(draws_TE.dtype)
        weights_TK = used_TK / used_TK.sum(1, keepdim=True).clamp(min=1)
        # There is no score: every expert is as good for a token as any other.
        scores_TE = torch.full_like(draws_TE, 1 / self.num_experts)
        return make_routing(torch.zeros_like(draws_TE), scores_TE, ids_TK, weights_TK)

    def select(self, draws_TE: Tensor, context: MoEContext) -> Tensor:
        """Return the (T, K) ids of the experts with the largest draws; padding has none."""
        return choose(draws_TE, draws_TE, context.k_or(self.config.top_k), context)
