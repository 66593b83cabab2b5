"""The presets of published systems, their experts narrow or few, and what their tests share.

With few experts a test gives its logits by hand: the router's weight is then the identity, so that
the tokens are the logits.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.config import load_config
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.moe.stats import MoEOutput

CONFIGS = Path(__file__).parents[3] / "configs"
TOKENS, DIM = 12, 8


def small(name: str) -> MoEConfig:
    """Return the experts of a preset, narrow."""
    moe = load_config(CONFIGS / f"{name}.yaml").model.moe
    return moe.model_copy(update={"expert_ffn_dim": 4})


def training(num_tokens: int, seq_len: int | None = None) -> MoEContext:
    """Return the context of a global batch of one micro-batch; of one sequence, unless told."""
    seq_len = seq_len or num_tokens
    totals = BatchTotals(num_tokens, num_tokens, num_tokens // seq_len, 1)
    return MoEContext(seq_len=seq_len, token_ids_T=torch.arange(num_tokens), totals=totals)


def layer_of(config: MoEConfig) -> tuple[MoELayer, Tensor, MoEContext]:
    torch.manual_seed(0)
    layer = MoELayer(config, dim=DIM).double()
    torch.nn.init.normal_(layer.router.gate.weight)
    return layer, torch.randn(TOKENS, DIM, dtype=torch.float64), training(TOKENS)


def with_few_experts(name: str, num_experts: int, *changes: str) -> MoELayer:
    """Build a layer of a preset whose tokens are its logits, as wide as it has experts.

    Args:
        name: of the preset.
        num_experts: an even number, as rows of a grouped product are multiples of 16 bytes.
        changes: what else differs, `a.b=c` below `model.moe`.
    """
    overrides = [f"num_experts={num_experts}", "expert_ffn_dim=8", *changes]
    overrides = ["parallel.ep=1", *(f"model.moe.{change}" for change in overrides)]
    torch.manual_seed(0)
    config = load_config(CONFIGS / f"{name}.yaml", overrides).model.moe
    layer = MoELayer(config, dim=num_experts).double()
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.eye(num_experts))
    return layer


def logs(probabilities: list[list[float]]) -> Tensor:
    """Return the logits that a softmax makes these probabilities of; rows sum to 1."""
    p_TE = torch.tensor(probabilities, dtype=torch.float64)
    torch.testing.assert_close(p_TE.sum(1), torch.ones(len(p_TE), dtype=torch.float64))
    return p_TE.log()


def expert(layer: MoELayer, number: int, x: Tensor) -> Tensor:
    """Return what a routed expert makes of a token, as SwiGLU has it."""
    return swiglu(x, layer.experts.w_gate_up_E2FD[number], layer.experts.w_down_EDF[number])


def swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    gate, up = (w_gate_up @ x).chunk(2)
    return w_down @ (F.silu(gate) * up)


def weighted(layer: MoELayer, output: MoEOutput) -> float:
    """Return what the layer adds to the training loss."""
    weights = layer.config.loss_weights()
    assert weights.keys() == output.losses.keys()
    return sum(weights[name] * loss.item() for name, loss in output.losses.items())


def in_groups(scores_TE: Tensor, num: int, used: int, scored_by: int, k: int) -> Tensor:
    """The k best experts of the groups whose `scored_by` best experts sum to most."""
    grouped = scores_TE.view(len(scores_TE), num, -1)
    best = grouped.topk(scored_by).values.sum(-1).topk(used).indices
    open_ = torch.zeros(len(scores_TE), num, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~open_[..., None], -torch.inf).flatten(1).topk(k).indices


def assert_gates_are(name: str, gates: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Compare the gates of a preset with those that its paper makes of the logits and k."""
    config = small(name)
    layer, x_TD, context = layer_of(config)
    routing = layer.router(x_TD, context)
    logits_TE = (x_TD @ layer.router.gate.weight.T).to(routing.scores_TE.dtype)
    ids_TK, weights_TK = gates(logits_TE, config.used_router.top_k)
    want = torch.zeros_like(logits_TE).scatter_(1, ids_TK, weights_TK)
    got = torch.zeros_like(want).scatter_(1, routing.expert_ids_TK, routing.weights_TK.to(want))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
