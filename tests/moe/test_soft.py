"""Soft MoE against its equations, a slot at a time, and what it must not do."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from dmoe.models import ModelConfig
from dmoe.models.counts import flops_per_token, num_active_params, num_params, params_by_kind
from dmoe.moe import BatchTotals, MoEConfig, MoEContext
from dmoe.moe.soft import SoftMoELayer

SEQ_LEN, TOKENS, DIM, EXPERTS = 5, 15, 8, 4
CONTEXT = MoEContext(seq_len=SEQ_LEN, totals=BatchTotals(TOKENS, TOKENS, 3, 1))
TREE = {"num_experts": EXPERTS, "expert_ffn_dim": 8, "router": {"name": "soft_moe", "slots": 2}}


def build(**options: object) -> SoftMoELayer:
    tree = {**TREE, "router": {**TREE["router"], **options}}
    layer = MoEConfig.model_validate(tree).build(dim=DIM, activation="gelu").double()
    assert isinstance(layer, SoftMoELayer)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, DIM, generator=generator).double().requires_grad_()


def soft_loop(layer: SoftMoELayer, x_TD: Tensor, valid: list[bool]) -> Tensor:
    """Define the layer: a sequence and a slot at a time."""
    gate, rows = layer.router.gate, []
    for start in range(0, TOKENS, SEQ_LEN):
        sequence = [t for t in range(start, start + SEQ_LEN) if valid[t]]
        logits: dict[int, Tensor] = {}
        for t in sequence:
            x, weight = x_TD[t], gate.weight
            if gate.normalize:
                x, weight = x / x.norm(), gate.scale * weight / weight.norm(dim=1, keepdim=True)
            logits[t] = weight @ x
        outputs = []
        for slot in range(EXPERTS * 2 if sequence else 0):
            shares = torch.stack([logits[t][slot] for t in sequence]).softmax(0)
            mean = sum(share * x_TD[t] for share, t in zip(shares, sequence, strict=True))
            hidden = F.gelu(layer.experts.w_up_EFD[slot // 2] @ mean, approximate="tanh")
            outputs.append(layer.experts.w_down_EDF[slot // 2] @ hidden)
        for t in range(start, start + SEQ_LEN):
            y = 0 * x_TD[t]
            if valid[t]:
                y = sum(c * out for c, out in zip(logits[t].softmax(0), outputs, strict=True))
            rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loop(normalize: bool, padded: bool) -> None:
    valid = [not padded or (t % 3 > 0 and t < 10) for t in range(TOKENS)]  # the last: padding only
    context = dataclasses.replace(CONTEXT, valid_T=torch.tensor(valid) if padded else None)
    results = []
    for forward in (lambda layer, x: layer(x, context)[0], lambda *a: soft_loop(*a, valid)):
        layer, x_TD = build(normalize=normalize), tokens()
        y_TD = forward(layer, x_TD)
        y_TD.square().sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
        results.append([y_TD.detach(), x_TD.grad, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    _, output = build()(tokens(), context)
    assert output.stats.counts_E.tolist() == [2 * (2 if padded else 3)] * EXPERTS


def test_by_hand() -> None:
    """Logits of 0: slots are the mean of the tokens, and a token gets the mean of the slots."""
    layer, x_TD = build(normalize=False), tokens()
    layer.router.gate.weight.data.zero_()
    y_TD, _ = layer(x_TD, CONTEXT)
    means = x_TD.view(3, SEQ_LEN, DIM).mean(1)
    hidden = F.gelu(torch.einsum("efd,bd->bef", layer.experts.w_up_EFD, means), approximate="tanh")
    expected = torch.einsum("edf,bef->bd", layer.experts.w_down_EDF, hidden) / EXPERTS
    torch.testing.assert_close(
        y_TD.view(3, SEQ_LEN, DIM), expected[:, None].expand(3, SEQ_LEN, DIM)
    )


def test_sequences_do_not_mix_and_order_does_not_matter() -> None:
    layer, x_TD = build(), tokens().detach()
    y_TD, _ = layer(x_TD, CONTEXT)
    changed = x_TD.clone()
    changed[SEQ_LEN - 1] += 1
    after, _ = layer(changed, CONTEXT)
    assert not torch.isclose(after[:SEQ_LEN], y_TD[:SEQ_LEN]).all(1).any(), "it looks ahead"
    assert torch.equal(after[SEQ_LEN:], y_TD[SEQ_LEN:])
    order = torch.tensor([3, 1, 4, 0, 2, *range(SEQ_LEN, TOKENS)])
    shuffled, _ = layer(x_TD[order], CONTEXT)
    torch.testing.assert_close(shuffled, y_TD[order])


def test_no_tokens_and_bfloat16() -> None:
    layer = build()
    y_TD, output = layer(tokens()[:0], CONTEXT)
    y_TD.sum().backward()
    assert not output.stats.counts_E.any()
    narrow, _ = build().float()(tokens().detach().bfloat16(), CONTEXT)
    assert narrow.dtype == torch.bfloat16


def test_costs_by_hand() -> None:
    """All parameters are active; 8 slots of a sequence of 16 tokens are half a pass a token."""
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    config = ModelConfig.model_validate({**sizes, "moe": TREE})
    assert num_active_params(config) == num_params(config)
    experts = params_by_kind(config)["experts"]
    idle = flops_per_token(config, 16, training=False, k=0)
    assert flops_per_token(config, 16, training=False) == idle + 2 * experts / EXPERTS / 2
    assert config.moe.router.warning.startswith("model.moe.router.name = soft_moe is not causal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": {"factor": 1}}, "leave capacity out"),
        ({"losses": {"load_balance_weight": 1}}, "leave losses out"),
        ({"elastic": {"k_max": 2}}, "elastic does not go with router.name = soft_moe"),
        ({"zero_computation": {"zeros": 1}}, "router.name = soft_moe has none of"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({**TREE, **change})
