"""GShard (arXiv 2006.16668): two experts a token, the second by chance, in local groups."""

import math

import pytest
import torch
from narrow_presets import layer_of, small, training

from dmoe.moe import MoEConfig, MoEContext
from dmoe.moe.capacity import apply_capacity
from dmoe.moe.routers import TopKConfig
from dmoe.rng import stream_key, token_uniform

TOKENS = 10_000
GROUP, EXPERTS = 256, 32


@pytest.mark.parametrize("second", [0.05, 0.2, 0.4, 0.5])
def test_the_second_expert_is_used_with_probability_min_1_2g(second) -> None:
    """Of 10,000 tokens with g2 = `second`; the first expert keeps the gate 1 - g2."""
    router = TopKConfig(top_k=2, second_choice="random").build(dim=1, num_experts=3)
    router.gate.weight.data = torch.tensor([[1 - second], [second], [1e-9]]).log()
    routing = router(torch.ones(TOKENS, 1), training(TOKENS))
    is_sent = routing.expert_ids_TK[:, 1] >= 0
    probability = min(1, 2 * second)
    error = 4 * math.sqrt(probability * (1 - probability) / TOKENS) + 1e-6
    assert abs(is_sent.float().mean().item() - probability) <= error
    assert (routing.expert_ids_TK[:, 0] == 0).all()
    torch.testing.assert_close(routing.weights_TK[:, 0], torch.full((TOKENS,), 1 - second))
    assert routing.counts_E.tolist() == [TOKENS, is_sent.sum(), 0]


def test_at_inference_the_second_expert_is_always_used() -> None:
    router = TopKConfig(top_k=2, second_choice="random").build(dim=2, num_experts=3)
    routing = router(torch.randn(50, 2), MoEContext(seq_len=50))
    assert (routing.expert_ids_TK >= 0).all()


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": {"top_k": 1}}, r"and here they are 1 and true"),
        ({"router": {"normalize": False}}, r"and here they are 2 and false"),
        ({"elastic": {"k_max": 2}}, r"elastic draws how many"),
    ],
)
def test_a_random_second_choice_is_for_two(moe, message) -> None:
    router = {"name": "top_k", "second_choice": "random", **moe.get("router", {})}
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 4, "expert_ffn_dim": 8, **moe, "router": router})


def algorithm_1(
    gates_SE: list[list[float]], draws: list[float], capacity: int
) -> tuple[list[list[float]], float]:
    """Gate the tokens of one group as algorithm 1 does: G_{s,E}, and the loss l_aux.

    A second choice that is not sent takes no place in its expert.
    """
    num_tokens, num_experts = len(gates_SE), len(gates_SE[0])
    combine_SE = [[0.0] * num_experts for _ in gates_SE]
    best = [sorted(range(num_experts), key=lambda e: -gates[e])[:2] for gates in gates_SE]
    counts = [0] * num_experts
    for s, (first, second) in enumerate(best):
        if counts[first] < capacity:
            total = gates_SE[s][first] + gates_SE[s][second]
            combine_SE[s][first] = gates_SE[s][first] / total
        counts[first] += 1
    means = [sum(column) / num_tokens for column in zip(*gates_SE, strict=True)]
    shares = [count / num_tokens for count in counts]
    loss = sum(c * m for c, m in zip(shares, means, strict=True)) / num_experts
    for s, (first, second) in enumerate(best):
        gate = gates_SE[s][second] / (gates_SE[s][first] + gates_SE[s][second])
        if 2 * gate <= draws[s]:
            continue
        if counts[second] < capacity:
            combine_SE[s][second] = gate
        counts[second] += 1
    return combine_SE, loss


@pytest.mark.parametrize(
    ("in_training", "capacity"), [(True, 2 * GROUP // EXPERTS), (False, 4 * GROUP // EXPERTS)]
)
def test_gates_and_loss_are_those_of_algorithm_1(in_training: bool, capacity: int) -> None:
    """The preset on two groups of 256 tokens: C = 2 S / E in training, twice that outside.

    The paper divides its loss by E where ours is multiplied.
    """
    layer, _, _ = layer_of(small("gshard"))
    num_tokens = 2 * GROUP
    x_TD = torch.randn(num_tokens, layer.router.gate.weight.shape[1], dtype=torch.float64)
    context = training(num_tokens) if in_training else MoEContext(seq_len=num_tokens)
    routing = layer.router(x_TD, context)
    served = apply_capacity(routing, layer.config.capacity, context)
    used_TK = served.expert_ids_TK >= 0
    got = torch.zeros(num_tokens, EXPERTS, dtype=torch.float64)
    got.scatter_add_(1, served.expert_ids_TK.clamp(min=0), served.weights_TK)

    draws_T = torch.zeros(num_tokens)
    if in_training:
        key = stream_key(context.seed, "second_choice", context.step, context.layer)
        draws_T = token_uniform(key, context.token_ids_T, 1)[:, 0]
    gates_TE = (x_TD @ layer.router.gate.weight.T).softmax(-1)
    groups = zip(gates_TE.split(GROUP), draws_T.split(GROUP), strict=True)
    made = [algorithm_1(gates.tolist(), draws.tolist(), capacity) for gates, draws in groups]
    want = torch.tensor([row for combine, _ in made for row in combine], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    # Else there would be nothing that capacity or chance decides.
    unsent = (routing.expert_ids_TK < 0).sum()
    assert (unsent > 0) == in_training
    assert (~used_TK).sum() > unsent
    if in_training:
        loss = layer.losses(routing, context)["load_balance"]
        assert loss.item() == pytest.approx(EXPERTS**2 * sum(loss for _, loss in made) / 2)
