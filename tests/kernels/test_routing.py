"""The router's kernels against their torch twins: the choice exactly, the rest closely."""

import pytest
import torch
from on_device import DEVICE, assert_close, twice  # first: it skips this file

from dmoe.ops.routing import (
    GateForm,
    select_experts,
    select_experts_torch,
    weigh_experts,
    weigh_experts_torch,
)

pytest.importorskip("dmoe_kernels.routing")

# Tokens, experts, slots: one block and several, a whole one and a tail, widths no power of 2.
SHAPES = [(37, 5, 3), (128, 8, 2), (129, 64, 8), (1, 1, 1), (0, 4, 2), (6, 384, 6)]


def logits_of(tokens: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, experts, generator=generator) * 2


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
def test_selects_as_torch_does(tokens: int, experts: int, k: int, score: str) -> None:
    logits, bias = logits_of(tokens, experts), torch.randn(experts)
    generator = torch.Generator().manual_seed(0)
    k_T = torch.randint(0, k + 1, (tokens,), generator=generator)
    valid_T = torch.rand(tokens, generator=generator) > 0.2
    for each, valid in ((k, None), (k_T, None), (k_T, valid_T)):
        want = select_experts_torch(logits, bias, each, k, valid, score)
        on_device = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in (each, valid)]
        inputs = (logits.to(DEVICE), bias.to(DEVICE), on_device[0], k, on_device[1], score)
        (got,) = twice(lambda inputs=inputs: [select_experts(*inputs)])
        assert torch.equal(got.cpu(), want)


def test_ties_go_to_the_lowest_id() -> None:
    inf = torch.inf
    rows = [[1, 1, 1, 1, 1], [0, 2, -1, 2, 2], [-inf, 0, -inf, -inf, 0], [-0.0, 0.0, -1, 0.0, -0.0]]
    logits = torch.tensor(rows, device=DEVICE)
    for score in ("softmax", "sigmoid"):
        ids = select_experts(logits, torch.zeros(5, device=DEVICE), 3, 3, None, score)
        assert ids.tolist() == [[0, 1, 2], [1, 3, 4], [1, 4, 0], [0, 1, 3]]


def test_a_negative_bias_orders_too() -> None:
    logits = torch.zeros(1, 4, device=DEVICE)
    bias = torch.tensor([-3.0, -1.0, -2.0, -1.0], device=DEVICE)
    assert select_experts(logits, bias, 4, 4, None, "sigmoid").tolist() == [[1, 3, 2, 0]]


FORMS = [
    GateForm("softmax", False, True, 1.0),
    GateForm("softmax", False, False, 2.5),
    GateForm("softmax", True, False, 1.0),
    GateForm("softmax", True, True, 0.5),
    GateForm("sigmoid", False, True, 2.5),
    GateForm("sigmoid", False, False, 1.0),
]


@pytest.mark.parametrize(
    ("form", "shape"), [*((f, SHAPES[0]) for f in FORMS), *((FORMS[0], s) for s in SHAPES[1:])]
)
def test_weighs_as_torch_does(form: GateForm, shape: tuple[int, int, int]) -> None:
    tokens, experts, k = shape
    logits, generator = logits_of(tokens, experts), torch.Generator().manual_seed(1)
    ids = logits.argsort(1, descending=True)[:, :k]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -1)
    gradients = logits_of(tokens + 1, experts)[:tokens], torch.randn(tokens, k)
    for used in ((0,), (1,), (0, 1)):  # probabilities alone, gates alone, both
        got = logits.clone().to(DEVICE).requires_grad_()
        want = logits.double().requires_grad_()
        out = weigh_experts(got, ids.to(DEVICE), form)
        twin = weigh_experts_torch(want, ids, form)
        for a, b in zip(out, twin, strict=True):
            assert_close(a, b, 1e-6)
        sum((out[i] * gradients[i].to(DEVICE)).sum() for i in used).backward()
        sum((twin[i] * gradients[i].double()).sum() for i in used).backward()
        assert (got.grad.double().cpu() - want.grad).norm() <= 2e-6 * max(1.0, want.grad.norm())


def test_one_expert_has_a_gate_of_one_and_no_gradient() -> None:
    logits = logits_of(37, 5).to(DEVICE).requires_grad_()
    _, weights = weigh_experts(
        logits, logits.argmax(1, keepdim=True), GateForm("sigmoid", False, True, 1.0)
    )
    assert torch.equal(weights, torch.ones_like(weights))
    weights.sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_twice_gives_the_same_bits(form: GateForm) -> None:
    logits = logits_of(129, 64).to(DEVICE)
    ids = logits.argsort(1, descending=True)[:, :8]

    def compute() -> list[torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        scores, weights = weigh_experts(leaf, ids, form)
        (scores.square().sum() + weights.square().sum()).backward()
        return [scores, weights, leaf.grad]

    twice(compute)


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # that they are not float64
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_differences(form: GateForm) -> None:
    """In float32, so of differences of some size."""
    logits = logits_of(3, 5)
    ids = logits.argsort(1, descending=True)[:, :3]
    ids[1, 2] = -1
    leaf, on_device = logits.to(DEVICE).requires_grad_(), ids.to(DEVICE)
    assert torch.autograd.gradcheck(
        lambda logits: weigh_experts(logits, on_device, form), leaf, eps=1e-2, atol=1e-3, rtol=1e-3
    )
