"""Phi-3.5-MoE (GRIN, arXiv 2409.12136): two experts drawn one after the other, by SparseMixer."""

import pytest
import torch
from narrow_presets import logs, with_few_experts

from dmoe.moe import MoEContext


def test_gates_are_those_of_the_paper() -> None:
    """At inference the best expert, and the best of the rest, each weighed among those close to it.

    Close is what is within a share of 2 x 0.01: of logits 1, 0.99, 0.5 and -1 the first two, so the
    first gate is of those two; of the rest 0.99 is alone, and its gate is 1.
    """
    layer = with_few_experts("phi_3_5_moe", 4)
    assert layer.router.config.name == "sparse_mixer"
    x_TD = torch.tensor([[1.0, 0.99, 0.5, -1.0]], dtype=torch.float64)
    routing = layer.router(x_TD, MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [[0, 1]]
    first = torch.tensor([1.0, 0.99], dtype=torch.float64).softmax(0)[0].item()
    assert routing.weights_TK[0].tolist() == pytest.approx([first, 1.0])


def test_16_experts_of_which_a_token_has_two() -> None:
    layer = with_few_experts("phi_3_5_moe", 16, "expert_ffn_dim=8")
    routing = layer.router(logs([[1 / 16] * 16]), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.shape == (1, 2)
    assert layer.config.losses.load_balance_weight == 0.01
