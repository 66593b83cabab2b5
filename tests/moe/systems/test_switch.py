"""Switch (arXiv 2101.03961): one expert a token, whose gate is the plain probability."""

import math

import pytest
import torch
from narrow_presets import CONFIGS, logs, training, weighted, with_few_experts

from dmoe.config import load_config
from dmoe.models import build_model
from dmoe.moe import MoEConfig, MoEContext, MoELayer
from dmoe.moe.routers import TopKConfig


def test_a_router_in_bfloat16_rounds_logits_and_scores() -> None:
    """What table 2 compares with; the preset's router is float32."""
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


@pytest.mark.parametrize("name", ["switch", "switch_base_8"])
def test_the_gate_of_the_presets_by_hand(name: str) -> None:
    """Eq. 2: 0.6, where a gate that is divided by its sum would be 1."""
    routing = with_few_experts(name, 4).router(logs([[0.1, 0.6, 0.2, 0.1]]), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [[1]]
    assert routing.weights_TK.tolist() == [[pytest.approx(0.6)]]


@pytest.mark.parametrize("name", ["switch", "switch_base_8"])
def test_the_loss_by_hand(name: str) -> None:
    """Eq. 4 to 6: f = (1/2, 1/4, 1/4, 0), P = (1.3, 1, 1.2, 0.5) / 4, so 0.01 x 4 x 0.3."""
    layer = with_few_experts(name, 4, "router.jitter=0")
    x_TD = logs(
        [[0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2], [0.1, 0.1, 0.7, 0.1], [0.1, 0.6, 0.2, 0.1]]
    )
    _, output = layer(x_TD, training(4))
    assert output.stats.counts_E.tolist() == [2, 1, 1, 0]
    assert weighted(layer, output) == pytest.approx(0.012)


def test_an_expert_that_is_full_leaves_tokens_to_the_residual() -> None:
    """Eq. 3: 16 tokens, 4 experts: 5 places in training, 8 outside. Seven tokens want expert 0."""
    layer = with_few_experts("switch", 4)
    choice_T = torch.tensor([0, 1, 0, 2, 0, 3, 0, 1, 0, 2, 0, 3, 0, 1, 2, 3])
    x_TD = 3 * torch.eye(4, dtype=torch.float64)[choice_T]
    y_TD, output = layer(x_TD, training(16))
    assert (~y_TD.any(1)).nonzero().flatten().tolist() == [10, 12], "the sixth and the seventh"
    assert output.stats.dropped == 2
    y_TD, output = layer(x_TD, MoEContext(seq_len=16))
    assert y_TD.any(1).all()
    assert output.stats.dropped == 0


def test_initial_weights_of_the_preset_are_those_of_a_scale_of_a_tenth() -> None:
    """Section 2.4: deviation sqrt(0.1 / inputs), cut at two of them; tests/models/test_init.py."""
    model = build_model(load_config(CONFIGS / "switch.yaml").model)
    layer = model.moe_layers[0]
    experts = layer.experts
    for weight in (layer.router.gate.weight, experts.w_gate_up_E2FD, experts.w_down_EDF):
        deviation = math.sqrt(0.1 / weight.shape[-1])
        assert weight.abs().max() <= 2 * deviation
        assert weight.std().item() == pytest.approx(0.88 * deviation, rel=0.05)


def test_expert_dropout_changes_no_mean() -> None:
    """To fine-tune, 0.4 of an expert's neurons fall out; which ones, is in test_dropout.py."""
    layer = with_few_experts("switch", 4, "expert_dropout=0.4", "router.jitter=0", "capacity=null")
    num_tokens = 4000
    x_TD = torch.tensor([[2.0, 1.0, -1.0, 0.5]], dtype=torch.float64).expand(num_tokens, 4)
    y_TD, _ = layer(x_TD, training(num_tokens))
    [want_D] = layer(x_TD[:1], MoEContext(seq_len=1))[0]
    error_D = 5 * y_TD.std(0) / math.sqrt(num_tokens)
    assert (error_D > 0).all()
    assert ((y_TD.mean(0) - want_D).abs() <= error_D).all()
