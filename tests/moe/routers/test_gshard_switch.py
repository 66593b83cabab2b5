"""What GShard and Switch add to top-k: a random second expert, and a router in bfloat16."""

import math

import pytest
import torch

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.moe.routers import TopKConfig

TOKENS = 10_000
TOTALS = BatchTotals(num_tokens=TOKENS, num_targets=TOKENS, num_sequences=1, num_micro_batches=1)


def training(num_tokens: int = TOKENS) -> MoEContext:
    return MoEContext(
        seq_len=num_tokens, token_ids_T=torch.arange(num_tokens), totals=TOTALS, step=5
    )


@pytest.mark.parametrize("second", [0.05, 0.2, 0.4, 0.5])
def test_the_second_expert_is_used_with_probability_min_1_2g(second) -> None:
    """Of 10,000 tokens with g2 = `second`; the first expert keeps the gate 1 - g2."""
    router = TopKConfig(top_k=2, second_choice="random").build(dim=1, num_experts=3)
    router.gate.weight.data = torch.tensor([[1 - second], [second], [1e-9]]).log()
    routing = router(torch.ones(TOKENS, 1), training())
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


def test_a_router_in_bfloat16_rounds_logits_and_scores() -> None:
    router = TopKConfig(top_k=1, normalize=False, precision="bf16").build(dim=4, num_experts=3)
    x_TD = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    routing = router(x_TD, MoEContext(seq_len=20))
    logits = x_TD.bfloat16() @ router.gate.weight.bfloat16().t()
    assert torch.equal(routing.logits_TE, logits.float())
    assert torch.equal(routing.scores_TE, logits.softmax(-1).float())
    assert routing.weights_TK.dtype == torch.float32
    routing.weights_TK.sum().backward()
    assert router.gate.weight.grad.isfinite().all()


def test_switch_keeps_the_probability_as_its_gate() -> None:
    """y = p_i(x) E_i(x), and so the router learns from the language model."""
    config = MoEConfig(
        num_experts=3, expert_ffn_dim=8, router={"name": "top_k", "top_k": 1, "normalize": False}
    )
    layer = MoELayer(config, dim=8, activation="relu").double()
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    y_TD, _ = layer(x_TD, MoEContext(seq_len=5))
    p_TE = (x_TD @ layer.router.gate.weight.t()).softmax(-1)
    for x, p, y in zip(x_TD, p_TE, y_TD, strict=True):
        best = int(p.argmax())
        up, down = layer.experts.w_up_EFD[best], layer.experts.w_down_EDF[best]
        torch.testing.assert_close(y, p[best] * (down @ (up @ x).relu()))
