"""What every router promises, whatever it does: a new one joins in `every_router.py`.

Padding, ties, experts and batches without tokens, recomputation, precision, gradients.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from every_router import NUM_EXPERTS, ROUTERS
from torch import Tensor

from dmoe.config.choices import names_of
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer, MoEOutput, Routing, routers
from dmoe.moe.routers import RouterSection

ROOT = Path(__file__).parents[3]
SEQ_LEN, SEQUENCES, DIM = 6, 4, 8
TOKENS = SEQ_LEN * SEQUENCES
CONTEXT = MoEContext(
    seq_len=SEQ_LEN,
    token_ids_T=torch.arange(100, 100 + TOKENS),
    vocab_ids_T=torch.arange(TOKENS) * 7 % 11,
    totals=BatchTotals(TOKENS, TOKENS, SEQUENCES, 1),
    seed=3,
    step=4,
    layer=1,
)
INFERENCE = dataclasses.replace(CONTEXT, totals=None)
PADDING = torch.tensor([SEQ_LEN - 1, *range(SEQ_LEN, 2 * SEQ_LEN), TOKENS - 1])

# Without those that stand for a layer of another kind.
SECTIONS = [
    section for section in routers.ROUTERS if section.build_layer is RouterSection.build_layer
]
every_router = pytest.mark.parametrize("name", ROUTERS)
both_modes = pytest.mark.parametrize("context", [CONTEXT, INFERENCE], ids=["train", "infer"])


def fresh(context: MoEContext, **changes) -> MoEContext:
    """Return the context of another pass: nothing is decided yet."""
    return dataclasses.replace(context, replay=type(context.replay)(), **changes)


def build(name: str, dtype: torch.dtype = torch.float64) -> MoELayer:
    config = MoEConfig(num_experts=NUM_EXPERTS, expert_ffn_dim=8, router=ROUTERS[name])
    layer = MoELayer(config, dim=DIM)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return layer.to(dtype)


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, DIM, generator=generator).to(dtype)


def valid() -> Tensor:
    valid_T = torch.ones(TOKENS, dtype=torch.bool)
    valid_T[PADDING] = False
    return valid_T


def objective(layer: MoELayer, y_TD: Tensor, output: MoEOutput) -> Tensor:
    weights = layer.config.loss_weights()
    return y_TD.square().sum() + sum(weights[n] * loss for n, loss in output.losses.items())


def assert_well_formed(routing: Routing, num_tokens: int) -> None:
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    assert ids_TK.dtype == torch.int64
    assert weights_TK.shape == ids_TK.shape
    assert len(ids_TK) == num_tokens
    assert ((ids_TK >= -1) & (ids_TK < NUM_EXPERTS)).all()
    assert not weights_TK[ids_TK < 0].any()
    for name in ("weights_TK", "scores_TE", "logits_TE"):
        assert getattr(routing, name).isfinite().all(), name
    for name in ("scores_TE", "logits_TE"):
        assert getattr(routing, name).shape == (num_tokens, NUM_EXPERTS), name
    sums_T = routing.scores_TE.sum(1)
    torch.testing.assert_close(sums_T, torch.ones_like(sums_T))
    used = ids_TK[ids_TK >= 0]
    assert torch.equal(routing.counts_E, torch.bincount(used, minlength=NUM_EXPERTS))
    for ids in ids_TK.tolist():
        chosen = [expert for expert in ids if expert >= 0]
        assert len(chosen) == len(set(chosen)), "a token has an expert twice"


def test_every_router_is_in_the_list() -> None:
    registered = {name for section in SECTIONS for name in names_of(section)}
    assert registered == {section["name"] for section in ROUTERS.values()}


@pytest.mark.parametrize("section", routers.ROUTERS)
def test_every_router_has_a_file_to_start_from_and_a_row_in_the_readme(section) -> None:
    if section is routers.ForcedBalanceConfig:  # no way to train
        return
    files = [path.read_text() for path in (ROOT / "configs").glob("*.yaml")]
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line[:1] == "|"]
    for name in names_of(section):
        named = re.compile(rf"\bname: {name}\b")
        assert any(map(named.search, files)), "no file in configs/"
        assert any(map(named.search, rows)), "no row in the README"


@every_router
@both_modes
def test_a_routing_is_well_formed(name, context) -> None:
    routing = build(name).router(tokens(), fresh(context))
    assert_well_formed(routing, TOKENS)
    assert routing.counts_E.sum() > 0
    expected = build(name).config.used_router.loss_weights() if context.training else ()
    assert set(expected) <= set(routing.losses)


@every_router
@both_modes
def test_padding_neither_routes_nor_counts(name, context) -> None:
    """What stands in padding changes nothing, not even a loss."""
    layer, x_TD = build(name), tokens()
    context = fresh(context, valid_T=valid())
    y_TD, output = layer(x_TD, context)
    assert not y_TD[PADDING].any()
    assert not (layer.router(x_TD, context).expert_ids_TK[PADDING] >= 0).any()
    x_TD[PADDING] = 100 * x_TD[PADDING].flip(0)
    vocab_ids_T = context.vocab_ids_T.clone()
    vocab_ids_T[PADDING] = 0
    again_TD, changed = layer(x_TD, fresh(context, vocab_ids_T=vocab_ids_T))
    torch.testing.assert_close(again_TD, y_TD)
    assert torch.equal(changed.stats.counts_E, output.stats.counts_E)
    for loss in output.losses:
        torch.testing.assert_close(changed.losses[loss], output.losses[loss])


@every_router
@both_modes
@pytest.mark.parametrize("num_tokens", [0, SEQ_LEN])
def test_no_token_to_route(name, context, num_tokens) -> None:
    """Nothing, or nothing but padding: zero output, losses and gradients, and all are numbers."""
    layer = build(name)
    rows = slice(0, num_tokens)
    context = fresh(
        context,
        valid_T=torch.zeros(num_tokens, dtype=torch.bool),
        token_ids_T=context.token_ids_T[rows],
        vocab_ids_T=context.vocab_ids_T[rows],
    )
    y_TD, output = layer(tokens()[rows], context)
    assert not y_TD.any()
    assert not output.stats.counts_E.any()
    assert all(loss.item() == 0 for loss in output.losses.values())
    objective(layer, y_TD, output).backward()
    for parameter in layer.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@every_router
@both_modes
def test_equal_scores_are_an_ordinary_case(name, context) -> None:
    """Tokens that are alike, and experts too, are routed, the same in each pass."""
    layer = build(name)
    x_TD = torch.zeros(TOKENS, DIM, dtype=torch.float64)
    routings = [layer.router(x_TD, fresh(context)) for _ in range(2)]
    assert_well_formed(routings[0], TOKENS)
    assert torch.equal(routings[0].expert_ids_TK, routings[1].expert_ids_TK)


@every_router
def test_experts_without_tokens_get_no_gradient(name) -> None:
    """One token leaves most experts without any."""
    layer = build(name)
    context = fresh(
        CONTEXT,
        seq_len=1,
        token_ids_T=CONTEXT.token_ids_T[:1],
        vocab_ids_T=CONTEXT.vocab_ids_T[:1],
    )
    y_TD, output = layer(tokens()[:1], context)
    objective(layer, y_TD, output).backward()
    idle = output.stats.counts_E == 0
    for parameter in layer.experts.parameters():
        assert not parameter.grad[idle].any()
        assert parameter.grad.isfinite().all()


@every_router
def test_a_decision_is_made_once_for_a_micro_batch(name) -> None:
    """Recomputed activations may differ in the last bit; here they differ altogether."""
    router, context = build(name).router, fresh(CONTEXT)
    first = router(tokens(), context)
    again = router(-tokens(), context)
    assert torch.equal(again.expert_ids_TK, first.expert_ids_TK)


@every_router
def test_gradients_are_numbers(name) -> None:
    layer, x_TD = build(name), tokens().requires_grad_()
    y_TD, output = layer(x_TD, fresh(CONTEXT, valid_T=valid()))
    objective(layer, y_TD, output).backward()
    for tensor in (x_TD, *layer.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    assert x_TD.grad.any()
    assert not x_TD.grad[PADDING].any()


@every_router
@both_modes
def test_bfloat16_tokens_are_routed_in_float32(name, context) -> None:
    router = build(name, torch.float32).router
    routing = router(tokens(torch.bfloat16), fresh(context))
    assert_well_formed(routing, TOKENS)
    tensors = (routing.weights_TK, routing.scores_TE, *routing.losses.values())
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@every_router
def test_nothing_is_drawn_from_the_global_generator(name) -> None:
    """The same step, layer and tokens give the same routing on any rank, at any time."""
    router = build(name).router
    first = router(tokens(), fresh(CONTEXT))
    torch.rand(1)
    again = router(tokens(), fresh(CONTEXT))
    assert torch.equal(first.expert_ids_TK, again.expert_ids_TK)
    assert torch.equal(first.weights_TK, again.weights_TK)
