"""The MoE layer against a loop over tokens: output, losses and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.moe.routers import choice
from dmoe.ops.expert_capacity import keep_slots_loop

TOKENS, SEQ_LEN, DIM, EXPERTS, FFN = 12, 6, 8, 5, 8
TOTALS = BatchTotals(num_tokens=10, num_targets=10, num_sequences=2, num_micro_batches=1)
VALID_T = torch.arange(TOKENS) < 10


def build(activation: str = "swiglu", **options) -> MoELayer:
    config = MoEConfig(num_experts=EXPERTS, expert_ffn_dim=FFN, **options)
    layer = MoELayer(config, dim=DIM, activation=activation).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64).requires_grad_()


def training_context() -> MoEContext:
    return MoEContext(seq_len=SEQ_LEN, valid_T=VALID_T, totals=TOTALS)


def network(x: Tensor, w_up: Tensor, w_down: Tensor, activation: str) -> Tensor:
    hidden = w_up @ x
    if activation == "swiglu":
        gate, up = hidden.chunk(2)
        return w_down @ (F.silu(gate) * up)
    return w_down @ F.gelu(hidden, approximate="tanh")


def layer_loop(
    layer: MoELayer, x_TD: Tensor, context: MoEContext, activation: str
) -> tuple[Tensor, Tensor]:
    """Define the layer with its default router, a token at a time; return y and its losses."""
    experts, top_k = layer.experts, layer.config.router.top_k
    w_up = experts.w_gate_up_E2FD if activation == "swiglu" else experts.w_up_EFD
    probabilities = (x_TD @ layer.router.gate.weight.t()).softmax(-1)
    ids_TK = probabilities.argsort(dim=-1, descending=True)[:, :top_k]
    ids_TK = ids_TK.masked_fill(~VALID_T[:, None], -1)
    routing = layer.router(x_TD, MoEContext(seq_len=SEQ_LEN, valid_T=VALID_T))
    served_TK = ids_TK
    if layer.config.capacity is not None:
        rule = layer.config.capacity.rule(context, len(x_TD))
        served_TK = keep_slots_loop(ids_TK, routing.weights_TK, EXPERTS, rule)
    outputs = []
    for x, p, ids, served in zip(x_TD, probabilities, ids_TK.tolist(), served_TK, strict=True):
        y = torch.zeros_like(x)
        for expert in served[served >= 0].tolist():
            gate = p[expert] / p[ids].sum()
            y = y + gate * network(x, w_up[expert], experts.w_down_EDF[expert], activation)
        if layer.shared_experts is not None:
            shared = layer.shared_experts
            y = y + network(x, shared.up_proj.weight, shared.down_proj.weight, activation)
        outputs.append(y)
    counts = torch.bincount(ids_TK[VALID_T].flatten(), minlength=EXPERTS)
    balance = EXPERTS * (counts.double() / (10.0 * top_k) * probabilities[VALID_T].mean(0)).sum()
    z = (x_TD @ layer.router.gate.weight.t())[VALID_T].logsumexp(-1).square().mean()
    return torch.stack(outputs), 0.3 * balance + 0.2 * z


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("num_shared_experts", [0, 2])
@pytest.mark.parametrize("capacity", [None, {"factor": 0.7, "minimum": 0}])
@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_equals_the_loop(activation, num_shared_experts, capacity, backend) -> None:
    layer = build(
        activation,
        num_shared_experts=num_shared_experts,
        capacity=capacity,
        backend=backend,
        losses={"load_balance_weight": 0.3, "z_loss_weight": 0.2},
    )
    x_TD = tokens()
    context = training_context()
    y_TD, output = layer(x_TD, context)
    aux = sum(
        weight * output.losses[name] for name, weight in layer.config.losses.weights().items()
    )
    y_loop, aux_loop = layer_loop(layer, x_TD, training_context(), activation)
    torch.testing.assert_close(y_TD, y_loop, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(aux, aux_loop, rtol=1e-11, atol=0)
    assert (output.stats.dropped > 0) == (capacity is not None)

    leaves = [x_TD, *layer.parameters()]
    dy_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=torch.float64).view_as(y_TD)
    gradients = torch.autograd.grad((y_TD * dy_TD).sum() + aux, leaves)
    gradients_loop = torch.autograd.grad((y_loop * dy_TD).sum() + aux_loop, leaves)
    for got, want in zip(gradients, gradients_loop, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_padding_gets_nothing_and_weighs_nothing() -> None:
    layer = build(losses={"load_balance_weight": 0.3, "z_loss_weight": 0.2})
    x_TD = tokens()
    y_TD, output = layer(x_TD, training_context())
    assert not y_TD[~VALID_T].any()
    assert output.stats.counts_E.sum() == 20
    (y_TD.sum() + sum(output.losses.values())).backward()
    assert not x_TD.grad[~VALID_T].any()


@pytest.mark.parametrize("capacity", [None, {"factor": 1.0}])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("num_tokens", [0, SEQ_LEN])
def test_no_token_to_route(num_tokens, scope, capacity) -> None:
    losses = {"load_balance_scope": scope, "z_loss_weight": 0.1}
    layer = build(num_shared_experts=1, capacity=capacity, losses=losses)
    x_TD = torch.randn(num_tokens, DIM, dtype=torch.float64, requires_grad=True)
    valid_T = torch.zeros(num_tokens, dtype=torch.bool)
    y_TD, output = layer(x_TD, MoEContext(seq_len=SEQ_LEN, valid_T=valid_T, totals=TOTALS))
    (y_TD.sum() + sum(output.losses.values())).backward()
    assert {name: loss.item() for name, loss in output.losses.items()} == {
        "load_balance": 0,
        "z": 0,
    }
    for parameter in (layer.router.gate.weight, *layer.experts.parameters()):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_losses_are_for_training_and_have_a_weight() -> None:
    layer = build(losses={"load_balance_weight": 0.0, "z_loss_weight": 0.2})
    assert layer.config.losses.weights() == {"z": 0.2}
    _, output = layer(tokens(), training_context())
    assert list(output.losses) == ["z"]
    _, output = layer(tokens(), MoEContext(seq_len=SEQ_LEN))
    assert output.losses == {}


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_the_losses_judge_the_choice_and_not_what_capacity_left_of_it(scope) -> None:
    losses = {"load_balance_scope": scope}
    capacities = (None, {"factor": 0.3, "minimum": 0})
    layers = [build(capacity=capacity, losses=losses) for capacity in capacities]
    (_, dropless), (_, dropping) = (layer(tokens(), training_context()) for layer in layers)
    assert dropping.stats.dropped > 0
    assert torch.equal(dropping.stats.counts_E, dropless.stats.counts_E)
    assert torch.equal(dropping.losses["load_balance"], dropless.losses["load_balance"])


def test_counts_of_the_global_batch_are_used_where_they_are_known() -> None:
    layer = build()
    counts_LE = torch.tensor([[0] * EXPERTS, [20, 0, 0, 0, 0]])
    context = MoEContext(seq_len=SEQ_LEN, totals=TOTALS, counts_LE=counts_LE).at_layer(1)
    x_TD = tokens()
    _, output = layer(x_TD, context)
    scores_TE = (x_TD @ layer.router.gate.weight.t()).softmax(-1)
    expected = EXPERTS * scores_TE[:, 0].sum() / TOTALS.num_tokens
    torch.testing.assert_close(output.losses["load_balance"], expected)


@pytest.mark.parametrize("capacity", [None, {"factor": 0.7, "policy": "score", "minimum": 0}])
def test_recompute_gives_the_same_gradients_and_never_routes_again(capacity, monkeypatch) -> None:
    layer = build(capacity=capacity, losses={"load_balance_weight": 0.3, "z_loss_weight": 0.2})
    calls = []
    choose = choice.top_k_ids

    def choose_otherwise_when_asked_again(scores_TE: Tensor, k: int) -> Tensor:
        calls.append(k)
        return choose(scores_TE if len(calls) == 1 else -scores_TE, k)

    def gradients(run) -> list[Tensor]:
        calls.clear()
        x_TD = tokens()
        y_TD, output = run(x_TD, training_context())
        objective = y_TD.square().sum() + sum(output.losses.values())
        return list(torch.autograd.grad(objective, [x_TD, *layer.parameters()]))

    monkeypatch.setattr(choice, "top_k_ids", choose_otherwise_when_asked_again)
    straight = gradients(layer)
    again = gradients(lambda *arguments: checkpoint(layer, *arguments, use_reentrant=False))
    assert len(calls) == 1
    for got, want in zip(again, straight, strict=True):
        assert torch.equal(got, want)


def test_bfloat16_tokens_meet_float32_weights() -> None:
    layer = build(num_shared_experts=1).float()
    x_TD = tokens().detach().bfloat16().requires_grad_()
    y_TD, output = layer(x_TD, training_context())
    assert y_TD.dtype == torch.bfloat16
    assert output.losses["load_balance"].dtype == torch.float32
    (y_TD.float().sum() + output.losses["load_balance"]).backward()
    assert x_TD.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    reference, _ = layer(x_TD.float(), training_context())
    assert (y_TD - reference).norm() < 0.02 * reference.norm()


def test_more_choices_than_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"top_k = 3 .* num_experts = 2"):
        MoEConfig(num_experts=2, expert_ffn_dim=4, router={"name": "top_k", "top_k": 3})


@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, [0, 1, 2, 3, 4, 5]), ({"every": 2}, [1, 3, 5]), ({"num_dense_layers": 4}, [4, 5])],
)
def test_which_layers_have_experts(options, layers) -> None:
    config = MoEConfig(num_experts=2, expert_ffn_dim=4, **options)
    assert [layer for layer in range(6) if config.is_moe_layer(layer)] == layers
