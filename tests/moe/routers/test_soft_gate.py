"""The soft gate: all experts, weighed by a softmax, as a dense sum over them."""

import pytest
import torch

from dmoe.moe import MoEConfig, MoEContext, MoELayer


def test_gates_by_hand() -> None:
    """Logits log 1, log 2, log 5 make gates 1/8, 2/8, 5/8."""
    config = MoEConfig(num_experts=3, expert_ffn_dim=8, router={"name": "soft_gate"})
    router = config.router.build(dim=1, num_experts=3)
    router.gate.weight.data = torch.tensor([[1.0], [2.0], [5.0]]).log()
    routing = router(torch.ones(1, 1), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2]]
    assert routing.weights_TK.tolist() == [pytest.approx([1 / 8, 2 / 8, 5 / 8])]
    assert config.router.nominal_k(3) == config.router.most_k(3) == 3
    assert config.loss_weights() == {}


def test_the_layer_is_the_weighted_sum_of_all_experts() -> None:
    config = MoEConfig(num_experts=3, expert_ffn_dim=8, router={"name": "soft_gate"})
    layer = MoELayer(config, dim=8, activation="relu").double()
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    y_TD, _ = layer(x_TD, MoEContext(seq_len=5))
    gates_TE = (x_TD @ layer.router.gate.weight.t()).softmax(-1)
    experts = layer.experts
    outputs = [
        (x_TD @ up.t()).relu() @ down.t()
        for up, down in zip(experts.w_up_EFD, experts.w_down_EDF, strict=True)
    ]
    expected = sum(g[:, None] * y for g, y in zip(gates_TE.t(), outputs, strict=True))
    torch.testing.assert_close(y_TD, expected, rtol=1e-12, atol=1e-12)
