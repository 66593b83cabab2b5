"""The presets of published systems: the gates of each, written out once more from its equations."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmoe.config import load_config
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS, DIM = 12, 8


def softmax_of_chosen(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mixtral (arXiv 2401.04088, section 2.1): the k largest logits, a softmax over them."""
    best, ids_TK = logits_TE.topk(k)
    return ids_TK, best.softmax(-1)


def softmax_then_chosen(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """OLMoE (arXiv 2409.02060), DeepSeekMoE (arXiv 2401.06066, eq. 4): plain probabilities."""
    probs, ids_TK = logits_TE.softmax(-1).topk(k)
    return ids_TK, probs


def normalized(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Qwen3 and ST-MoE: the probabilities of the chosen, divided by their sum."""
    ids_TK, probs = softmax_then_chosen(logits_TE, k)
    return ids_TK, probs / probs.sum(-1, keepdim=True)


def in_groups(scores_TE: Tensor, num: int, used: int, scored_by: int, k: int) -> Tensor:
    """The k best experts of the groups whose `scored_by` best experts sum to most."""
    grouped = scores_TE.view(len(scores_TE), num, -1)
    best = grouped.topk(scored_by).values.sum(-1).topk(used).indices
    open_ = torch.zeros(len(scores_TE), num, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~open_[..., None], -torch.inf).flatten(1).topk(k).indices


def deepseek_v2(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """arXiv 2405.04434, section 2.2.2: three of eight devices by their best expert, times 16."""
    probs_TE = logits_TE.softmax(-1)
    ids_TK = in_groups(probs_TE, 8, 3, 1, k)
    return ids_TK, 16 * probs_TE.gather(1, ids_TK)


def deepseek_v3(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """arXiv 2412.19437, eq. 12 to 16: sigmoid, 4 of 8 groups by their two best, times 2.5."""
    scores_TE = logits_TE.sigmoid()
    ids_TK = in_groups(scores_TE, 8, 4, 2, k)
    chosen = scores_TE.gather(1, ids_TK)
    return ids_TK, 2.5 * chosen / chosen.sum(-1, keepdim=True)


SYSTEMS = {
    "st_moe": normalized,
    "mixtral_8x7b": softmax_of_chosen,
    "qwen3_30b_a3b": normalized,
    "olmoe_1b_7b": softmax_then_chosen,
    "deepseek_moe_16b": softmax_then_chosen,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}


def small(name: str) -> MoEConfig:
    """Return the experts of a preset, narrow."""
    moe = load_config(CONFIGS / f"{name}.yaml").model.moe
    return moe.model_copy(update={"expert_ffn_dim": 4})


def layer_of(config: MoEConfig) -> tuple[MoELayer, Tensor, MoEContext]:
    torch.manual_seed(0)
    layer = MoELayer(config, dim=DIM).double()
    torch.nn.init.normal_(layer.router.gate.weight)
    totals = BatchTotals(TOKENS, TOKENS, 1, 1)
    context = MoEContext(seq_len=TOKENS, token_ids_T=torch.arange(TOKENS), totals=totals)
    return layer, torch.randn(TOKENS, DIM, dtype=torch.float64), context


@pytest.mark.parametrize("name", SYSTEMS)
def test_gates_are_those_of_the_paper(name: str) -> None:
    gates: Callable[[Tensor, int], tuple[Tensor, Tensor]] = SYSTEMS[name]
    config = small(name)
    layer, x_TD, context = layer_of(config)
    routing = layer.router(x_TD, context)
    logits_TE = (x_TD @ layer.router.gate.weight.T).to(routing.scores_TE.dtype)
    ids_TK, weights_TK = gates(logits_TE, config.used_router.top_k)
    want = torch.zeros_like(logits_TE).scatter_(1, ids_TK, weights_TK)
    got = torch.zeros_like(want).scatter_(1, routing.expert_ids_TK, routing.weights_TK.to(want))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_shared_experts_of_deepseek_always_work() -> None:
    """arXiv 2401.06066, eq. 9: what they return is added as it is."""
    layer, x_TD, context = layer_of(small("deepseek_moe_16b"))
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.zero_()
        y_TD, _ = layer(x_TD, context)
        want_TD = layer.shared_experts(x_TD)
    torch.testing.assert_close(y_TD, want_TD)
    assert want_TD.norm() > 0


def test_losses_and_capacity_are_those_of_the_paper() -> None:
    st, olmoe, qwen = (small(name) for name in ("st_moe", "olmoe_1b_7b", "qwen3_30b_a3b"))
    # ST-MoE (arXiv 2202.08906): capacity 1.25 and 2.0, balance 1e-2, z-loss 1e-3.
    assert (st.capacity.factor, st.capacity.eval_factor) == (1.25, 2.0)
    assert (st.losses.load_balance_weight, st.losses.z_loss_weight) == (0.01, 0.001)
    # OLMoE (arXiv 2409.02060, table 1): dropless, balance 1e-2, z-loss 1e-3.
    assert olmoe.capacity is None
    assert (olmoe.losses.load_balance_weight, olmoe.losses.z_loss_weight) == (0.01, 0.001)
    # Qwen3 (arXiv 2505.09388) balances the global batch, without drops.
    assert qwen.capacity is None
    assert qwen.losses.load_balance_scope == "global_batch"
