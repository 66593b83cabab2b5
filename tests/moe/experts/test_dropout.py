"""Expert dropout: which neurons fall out, what the layer makes of the rest, and that it is training
alone."""

import dataclasses

import pytest
import torch

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.moe.experts.dropout import dropout_factors

TOKENS, DIM, EXPERTS, FFN = 6, 8, 3, 8
CONTEXT = MoEContext(
    seq_len=TOKENS,
    token_ids_T=torch.arange(10, 10 + TOKENS),
    totals=BatchTotals(TOKENS, TOKENS, 1, 1),
    step=2,
)


def factors(numbers_R: torch.Tensor, counts_e: list[int], first: int = 0, **changes):
    return dropout_factors(
        0.4,
        numbers_R,
        torch.tensor(counts_e),
        first=first,
        num_experts=EXPERTS,
        width=FFN,
        context=dataclasses.replace(CONTEXT, **changes),
    )


def test_a_share_of_neurons_falls_out_and_the_rest_makes_up_for_it() -> None:
    many = factors(torch.arange(20_000), [20_000])
    assert set(many.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert abs((many == 0).float().mean().item() - 0.4) < 0.01
    assert abs(many.mean().item() - 1) < 0.01


def test_token_expert_step_and_layer_decide() -> None:
    """Rows of expert 1 are the same, be it the second expert here or the first."""
    numbers_R = torch.tensor([5, 6, 5])
    both = factors(numbers_R, [2, 1])
    assert torch.equal(both[2:], factors(torch.tensor([5]), [1], first=1))
    assert not torch.equal(both[0], both[2])
    for changes in ({"step": 3}, {"layer": 1}, {"seed": 1}):
        assert not torch.equal(factors(numbers_R, [2, 1], **changes), both)


def test_the_layer_drops_neurons_of_the_experts() -> None:
    router = {"name": "top_k", "top_k": 1, "normalize": False}
    config = MoEConfig(num_experts=EXPERTS, expert_ffn_dim=FFN, router=router, expert_dropout=0.4)
    layer = MoELayer(config, dim=DIM, activation="relu").double()
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64)
    y_TD, _ = layer(x_TD, CONTEXT)
    p_TE = (x_TD @ layer.router.gate.weight.t()).softmax(-1)
    for t, (x, p, y) in enumerate(zip(x_TD, p_TE, y_TD, strict=True)):
        best = int(p.argmax())
        up, down = layer.experts.w_up_EFD[best], layer.experts.w_down_EDF[best]
        kept = factors(torch.tensor([10 + t]), [1], first=best)[0]
        torch.testing.assert_close(y, p[best] * (down @ ((up @ x).relu() * kept)))


def test_other_layers_refuse_it() -> None:
    with pytest.raises(ValueError, match=r"router\.name = soft_moe has a layer of its own"):
        MoEConfig(num_experts=3, expert_ffn_dim=8, router={"name": "soft_moe"}, expert_dropout=0.4)
    with pytest.raises(ValueError, match=r"expert_dropout"):
        MoEConfig(num_experts=3, expert_ffn_dim=8, infinite={}, expert_dropout=0.4)


def test_experts_that_compute_again_refuse_it_and_neurons_refuse_those() -> None:
    options = {"num_experts": 3, "expert_ffn_dim": 8, "recompute_experts": True}
    for also in ({"expert_dropout": 0.4}, {"infinite": {}}, {"router": {"name": "soft_moe"}}):
        with pytest.raises(ValueError, match=r"recompute_experts"):
            MoEConfig.model_validate(options | also)


def test_bfloat16_rows_meet_float32_weights() -> None:
    options = {"num_experts": EXPERTS, "expert_ffn_dim": FFN, "expert_dropout": 0.4}
    layer = MoELayer(MoEConfig(**options), dim=DIM)
    x_TD = torch.randn(TOKENS, DIM).bfloat16().requires_grad_()
    y_TD, _ = layer(x_TD, dataclasses.replace(CONTEXT, replay=type(CONTEXT.replay)()))
    assert y_TD.dtype == torch.bfloat16
    y_TD.float().sum().backward()
    assert layer.experts.w_down_EDF.grad.dtype == torch.float32


def test_at_inference_none_falls_out() -> None:
    options = {"num_experts": EXPERTS, "expert_ffn_dim": FFN}
    layers = [
        MoELayer(MoEConfig(**options, expert_dropout=rate), dim=DIM).double() for rate in (0, 0.4)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64)
    inference = dataclasses.replace(CONTEXT, totals=None, replay=type(CONTEXT.replay)())
    outputs = [layer(x_TD, inference)[0] for layer in layers]
    torch.testing.assert_close(*outputs)
    trained, _ = layers[1](x_TD, CONTEXT)
    assert not torch.allclose(trained, outputs[1])
