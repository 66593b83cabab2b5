"""Qwen3-MoE (arXiv 2505.09388): many experts, balanced over the global batch (arXiv 2501.11873)."""

import pytest
import torch
from narrow_presets import assert_gates_are, logs, small, with_few_experts
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext, MoELayer

CODE, PROSE = [[0.4, 0.4, 0.1, 0.1]] * 2, [[0.1, 0.1, 0.4, 0.4]] * 2
"""Two micro-batches of two tokens, each with two experts of its own."""


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The probabilities of the chosen, divided by their sum."""
    probs, ids_TK = logits_TE.softmax(-1).topk(k)
    return ids_TK, probs / probs.sum(-1, keepdim=True)


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("qwen3_30b_a3b", gates)


def test_it_balances_the_global_batch_without_drops_or_shared_experts() -> None:
    config = small("qwen3_30b_a3b")
    assert config.capacity is None
    assert config.losses.load_balance_scope == "global_batch"
    assert config.losses.load_balance_weight == 0.001
    assert config.num_shared_experts == 0


def loss_and_gradients(layer: MoELayer) -> tuple[float, list[Tensor]]:
    """Return the loss of the two micro-batches, and the gradient of each one's logits."""
    micro_batches = [logs(rows).requires_grad_() for rows in (CODE, PROSE)]
    context = {
        "seq_len": 2,
        "totals": BatchTotals(num_tokens=4, num_targets=4, num_sequences=2, num_micro_batches=2),
        "counts_LE": torch.tensor([[2, 2, 2, 2]]),
    }
    outputs = [layer(x_TD, MoEContext(**context))[1] for x_TD in micro_batches]
    assert [output.stats.counts_E.tolist() for output in outputs] == [[2, 2, 0, 0], [0, 0, 2, 2]]
    loss = sum(output.losses["load_balance"] for output in outputs)
    return loss.item(), list(torch.autograd.grad(loss, micro_batches))


def test_experts_may_specialise_by_domain() -> None:
    """f is 1/4 each over both, so the loss is 1, its least, and there is nothing to learn."""
    loss, gradients = loss_and_gradients(with_few_experts("qwen3_30b_a3b", 4, "router.top_k=2"))
    assert loss == pytest.approx(1)
    assert all(gradient.abs().max() < 1e-15 for gradient in gradients)


def test_within_each_micro_batch_they_might_not() -> None:
    """There f = (1/2, 1/2, 0, 0), so 4 (0.2 + 0.2) = 1.6, which lowers the logits of both."""
    scope = "losses.load_balance_scope=micro_batch"
    layer = with_few_experts("qwen3_30b_a3b", 4, "router.top_k=2", scope)
    loss, gradients = loss_and_gradients(layer)
    assert loss == pytest.approx(1.6)
    assert (gradients[0][:, :2] > 0.01).all()
    assert (gradients[1][:, 2:] > 0.01).all()
