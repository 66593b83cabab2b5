"""Noisy top-k by hand, without its noise and with it."""

import dataclasses
import math

import pytest
import torch

from dmoe.moe import BatchTotals, MoEConfig, MoEContext
from dmoe.moe.losses.variation import squared_variation
from dmoe.moe.routers import NoisyTopKConfig, NoisyTopKRouter
from dmoe.moe.routers.noise import with_noise

TOKENS = 6


def build(**options) -> NoisyTopKRouter:
    """Three experts with the logits log 1, log 2, log 5 for the token (1)."""
    router = NoisyTopKConfig(name="noisy_top_k", **options).build(dim=1, num_experts=3)
    router.gate.weight.data = torch.tensor([[1.0], [2.0], [5.0]]).log()
    return router


def training(num_tokens: int = TOKENS) -> MoEContext:
    totals = BatchTotals(num_tokens, num_tokens, 1, 1)
    return MoEContext(seq_len=num_tokens, token_ids_T=torch.arange(num_tokens), totals=totals)


def test_inference_by_hand() -> None:
    """No noise: a softmax over the two largest logits."""
    routing = build()(torch.ones(1, 1), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [[2, 1]]
    assert routing.weights_TK.tolist() == [pytest.approx([5 / 7, 2 / 7])]
    assert routing.losses == {}


def test_training_without_noise_by_hand() -> None:
    """Importance 0, 2/7, 5/7 a token: mean 1/3, so CV^2 = (1/9 + 1/441 + 64/441) / 3 x 9."""
    router = build(noise=False, load_weight=0)
    routing = router(torch.ones(TOKENS, 1), training())
    expected = (1 / 9 + 1 / 441 + 64 / 441) * 3
    assert routing.losses["importance"].item() == pytest.approx(expected)
    assert list(routing.losses) == ["importance"]
    assert router.config.loss_weights() == {"importance": 0.1}


def test_training_chooses_and_weighs_by_the_noisy_logits() -> None:
    router, context = build(), training()
    x_TD = torch.linspace(0.1, 2, TOKENS)[:, None]
    routing = router(x_TD, context)
    clean_TE, std_TE = router.gate(x_TD)
    noisy_TE = with_noise(clean_TE, std_TE, context)
    values_TK, ids_TK = noisy_TE.topk(2)
    assert torch.equal(routing.expert_ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, values_TK.softmax(-1))
    load_E = torch.zeros(3)
    for t, noisy in enumerate(noisy_TE.tolist()):
        for i in range(3):
            kth_of_others = sorted(noisy[:i] + noisy[i + 1 :], reverse=True)[1]
            z = (clean_TE[t, i].item() - kth_of_others) / std_TE[t, i].item()
            load_E[i] += (1 + math.erf(z / math.sqrt(2))) / 2
    torch.testing.assert_close(routing.losses["load"], squared_variation(load_E))
    assert not torch.equal(routing.expert_ids_TK, clean_TE.topk(2).indices)


@pytest.mark.parametrize("scope", ["sequence", 3])
def test_losses_are_means_over_sets_of_tokens(scope) -> None:
    """Two sequences, or groups, of three tokens: as if each were a micro-batch of its own."""
    x_TD = torch.linspace(0.1, 2, TOKENS)[:, None]
    router = build(balance_scope=scope)
    totals = BatchTotals(TOKENS, TOKENS, num_sequences=2, num_micro_batches=1)
    context = dataclasses.replace(training(), seq_len=3, totals=totals)
    whole = router(x_TD, context).losses
    parts = []
    for start in (0, 3):
        rows = slice(start, start + 3)
        alone = dataclasses.replace(
            training(3), token_ids_T=context.token_ids_T[rows], totals=BatchTotals(3, 3, 1, 1)
        )
        parts.append(build()(x_TD[rows], alone).losses)
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (parts[0][name] + parts[1][name]) / 2)


def test_both_losses_teach_and_the_noise_learns() -> None:
    router = build()
    routing = router(torch.ones(TOKENS, 1), training())
    for name, loss in routing.losses.items():
        gradients = torch.autograd.grad(loss, list(router.parameters()), retain_graph=True)
        assert all(gradient.any() for gradient in gradients), name


def test_a_number_of_experts_from_outside() -> None:
    context = MoEContext(seq_len=2, k_L=(torch.tensor([1, 3]),))
    routing = build()(torch.ones(2, 1), context)
    assert routing.expert_ids_TK.tolist() == [[2, -1, -1], [2, 1, 0]]


def test_load_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"load_weight = 0\.1, but noise = false"):
        MoEConfig(num_experts=4, expert_ffn_dim=8, router={"name": "noisy_top_k", "noise": False})


def test_no_other_balance_loss_is_on() -> None:
    moe = {"num_experts": 4, "expert_ffn_dim": 8, "router": {"name": "noisy_top_k"}}
    assert MoEConfig(**moe).loss_weights() == {"importance": 0.1, "load": 0.1}
    both = MoEConfig(**moe, losses={"load_balance_weight": 0.5})
    assert both.loss_weights() == {"load_balance": 0.5, "importance": 0.1, "load": 0.1}
