"""Learned noise, and the smooth chance of being chosen, by hand and against redrawn noise."""

import math

import pytest
import torch
from torch import Tensor

from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import NoisyTopKConfig
from dmoe.moe.routers.noise import NoisyGate, chance_of_choice, is_chosen, with_noise
from dmoe.rng import stream_key, token_normal

TOTALS = BatchTotals(num_tokens=4, num_targets=4, num_sequences=1, num_micro_batches=1)
NUM_DRAWS = 10_000


def phi(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2


def test_chance_by_hand() -> None:
    """k = 2 of noisy logits 3, 2, 1: the chosen beat 1, and the last would have to beat 2."""
    noisy_TE = torch.tensor([[3.0, 2.0, 1.0]])
    clean_TE = torch.tensor([[2.0, 1.5, 1.0]])
    std_TE = torch.tensor([[1.0, 0.5, 2.0]])
    chosen_TE = torch.tensor([[True, True, False]])
    chance_TE = chance_of_choice(noisy_TE, clean_TE, std_TE, chosen_TE)
    expected = [phi((2 - 1) / 1), phi((1.5 - 1) / 0.5), phi((1 - 2) / 2)]
    assert chance_TE.tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("k", [1, 3])
def test_the_estimate_equals_the_frequency_over_redrawn_noise(k) -> None:
    """10,000 draws of one expert's noise at a time, while that of the others stays."""
    generator = torch.Generator().manual_seed(k)
    clean_E, noise_E = (torch.randn(6, generator=generator) for _ in range(2))
    std_E = 0.5 + torch.rand(6, generator=generator)
    noisy_E = clean_E + noise_E * std_E
    chosen_TE = is_chosen(noisy_E.topk(k).indices[None], 6)
    chance_E = chance_of_choice(noisy_E[None], clean_E[None], std_E[None], chosen_TE)[0]
    for expert in range(6):
        draws = noisy_E.repeat(NUM_DRAWS, 1)
        fresh = torch.randn(NUM_DRAWS, generator=generator)
        draws[:, expert] = clean_E[expert] + fresh * std_E[expert]
        frequency = (draws.topk(k).indices == expert).any(1).float().mean().item()
        chance = chance_E[expert].item()
        error = 4 * math.sqrt(chance * (1 - chance) / NUM_DRAWS) + 1e-4
        assert abs(frequency - chance) < error


def test_all_experts_or_none_are_certain_and_have_finite_gradients() -> None:
    noisy_TE, clean_TE, std_TE = (torch.ones(2, 3, requires_grad=True) for _ in range(3))
    chosen_TE = torch.tensor([[True] * 3, [False] * 3])
    chance_TE = chance_of_choice(noisy_TE, clean_TE, std_TE, chosen_TE)
    assert chance_TE.tolist() == [[1.0] * 3, [0.0] * 3]
    for gradient in torch.autograd.grad(chance_TE.sum(), [clean_TE, std_TE]):
        assert not gradient.any()


def test_is_chosen_by_hand() -> None:
    ids_TK = torch.tensor([[2, 0], [1, -1], [-1, -1]])
    assert is_chosen(ids_TK, 3).int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_noise_has_the_learned_size_and_follows_the_token() -> None:
    gate = NoisyGate(2, 3)
    assert not gate.weight.any()
    gate.noise_weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    clean_TE, std_TE = gate(torch.tensor([[2.0, -3.0]]))
    softplus = [math.log1p(math.exp(v)) for v in (2.0, -3.0, 0.0)]
    assert std_TE.tolist() == [pytest.approx(softplus)]
    context = MoEContext(seq_len=1, token_ids_T=torch.tensor([77]), seed=1, step=2, layer=3)
    draws = token_normal(stream_key(1, "router_noise", 2, 3), torch.tensor([77]), 3)
    torch.testing.assert_close(with_noise(clean_TE, std_TE, context), draws * std_TE)


@pytest.mark.parametrize("scale", [-100.0, 100.0])
def test_noise_of_any_size_gives_numbers(scale) -> None:
    """A softplus that vanishes does not divide by zero."""
    config = NoisyTopKConfig(name="noisy_top_k")
    router = config.build(dim=2, num_experts=4)
    router.gate.noise_weight.data.fill_(scale)
    router.gate.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    x_TD = torch.rand(4, 2, requires_grad=True)
    context = MoEContext(seq_len=4, token_ids_T=torch.arange(4), totals=TOTALS)
    routing = router(x_TD, context)
    losses: list[Tensor] = list(routing.losses.values())
    (sum(losses) + routing.weights_TK.square().sum()).backward()
    for tensor in (x_TD, *router.parameters()):
        assert tensor.grad.isfinite().all()
