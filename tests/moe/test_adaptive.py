"""The losses of 1991 by hand, their gradients in closed form, and a task that splits in two."""

import math

import pytest
import torch
from torch import Tensor, nn

from dmoe.moe.adaptive import (
    AdaptiveMixture,
    MixtureOutput,
    classification_loss,
    regression_loss,
    responsibilities,
)

LOG3 = math.log(3)
OBJECTIVES = ["cooperative", "competitive", "likelihood"]


def one_case() -> MixtureOutput:
    """Two experts say 0 and 2, with p = (1/4, 3/4)."""
    outputs_TEO = torch.tensor([[[0.0], [2.0]]], dtype=torch.float64, requires_grad=True)
    logits_TE = torch.tensor([[0.0, LOG3]], dtype=torch.float64, requires_grad=True)
    return MixtureOutput(outputs_TEO, logits_TE)


def random_cases() -> tuple[MixtureOutput, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs_TEO = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
    logits_TE = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    targets_TO = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    return MixtureOutput(outputs_TEO.requires_grad_(), logits_TE.requires_grad_()), targets_TO


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("cooperative", (1 - 1.5) ** 2),
        ("competitive", 1.0),
        ("likelihood", 0.5),
    ],
)
def test_regression_by_hand(objective, expected) -> None:
    """The target is 1: the blend is 1.5, and both experts are off by 1."""
    targets_TO = torch.ones(1, 1, dtype=torch.float64)
    assert regression_loss(one_case(), targets_TO, objective).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("cooperative", math.log(1 + 3**-0.5)),
        ("competitive", math.log(4) / 4 + math.log(4 / 3) * 3 / 4),
        ("likelihood", math.log(16 / 10)),
    ],
)
def test_classification_by_hand(objective, expected) -> None:
    """Experts give class 0 the probabilities 1/4 and 3/4, with p = (1/4, 3/4)."""
    outputs_TEO = torch.tensor([[[0.0, LOG3], [LOG3, 0.0]]])
    output = MixtureOutput(outputs_TEO, torch.tensor([[0.0, LOG3]]))
    loss = classification_loss(output, torch.tensor([0]), objective)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_the_paper(objective) -> None:
    output, d_TO = random_cases()
    num_cases = len(d_TO)
    p_TE1, o_TEO = output.gates_TE[..., None], output.outputs_TEO
    errors_TEO = d_TO[:, None] - o_TEO
    h_TE = responsibilities(output.logits_TE, -errors_TEO.square().sum(-1) / 2)
    expected = {
        "cooperative": -2 * p_TE1 * (d_TO - (p_TE1 * o_TEO).sum(1))[:, None],
        "competitive": -2 * p_TE1 * errors_TEO,
        "likelihood": -h_TE[..., None] * errors_TEO,
    }[objective]
    loss = regression_loss(output, d_TO, objective) * num_cases
    d_outputs, d_logits = torch.autograd.grad(loss, [o_TEO, output.logits_TE])
    torch.testing.assert_close(d_outputs, expected, rtol=1e-12, atol=1e-12)
    if objective == "likelihood":
        torch.testing.assert_close(d_logits, output.gates_TE - h_TE, rtol=1e-12, atol=1e-12)


def test_responsibilities_by_hand() -> None:
    """p = (1/4, 3/4) and likelihoods 3 : 1 make both equally responsible."""
    h_TE = responsibilities(torch.tensor([[0.0, LOG3]]), torch.tensor([[LOG3, 0.0]]))
    assert h_TE.tolist() == [pytest.approx([0.5, 0.5])]


def test_a_target_far_from_every_expert_has_a_finite_loss() -> None:
    output, _ = random_cases()
    loss = regression_loss(output, torch.full((5, 2), 1e3, dtype=torch.float64), "likelihood")
    loss.backward()
    assert loss.isfinite()
    assert output.outputs_TEO.grad.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_modules_can_be_experts(objective) -> None:
    """Experts of different kinds, on cases of three dims; each part gets a gradient."""
    wide = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4))
    mixture = AdaptiveMixture([nn.Linear(3, 4), wide], nn.Linear(3, 2))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    assert mixture.predict(x).shape == (6, 4)
    torch.testing.assert_close(mixture.predict_classes(x).sum(-1), torch.ones(6))
    loss = classification_loss(mixture(x), torch.arange(6) % 4, objective)
    (loss + regression_loss(mixture(x), torch.zeros(6, 4), objective)).backward()
    assert all(parameter.grad.any() for parameter in mixture.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targets_of_another_shape_are_refused(objective) -> None:
    """Those of (T,) would broadcast to (T, T), or to (T, E)."""
    output, _ = random_cases()
    with pytest.raises(ValueError, match=r"targets_TO has shape \(5,\), but must have \(5, 2\)"):
        regression_loss(output, torch.zeros(5), objective)
    with pytest.raises(ValueError, match=r"labels_T has shape \(1,\), but must have \(5,\)"):
        classification_loss(output, torch.zeros(1, dtype=torch.int64), objective)


@pytest.mark.parametrize("loss", [regression_loss, classification_loss])
def test_an_objective_that_is_none_is_refused(loss) -> None:
    output, targets_TO = random_cases()
    targets = targets_TO if loss is regression_loss else torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="'liklihood' is not one of cooperative, competitive, lik"):
        loss(output, targets, "liklihood")


def test_experts_and_gates_that_do_not_fit_are_refused() -> None:
    def mixture(*outputs: int, gate: int) -> AdaptiveMixture:
        return AdaptiveMixture([nn.Linear(3, width) for width in outputs], nn.Linear(3, gate))

    with pytest.raises(ValueError, match="experts is empty"):
        mixture(gate=1)
    for width in (1, 3):
        message = rf"output of the gate has shape \(6, {width}\), but must have \(6, 2\)"
        with pytest.raises(ValueError, match=message):
            mixture(4, 4, gate=width).predict(torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"return shapes \(6, 4\), \(6, 5\): all must"):
        mixture(4, 5, gate=2)(torch.zeros(6, 3))
    flat = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"return shapes \(6,\): all must"):
        AdaptiveMixture([flat, flat], nn.Linear(3, 2))(torch.zeros(6, 3))


def test_likelihood_gives_each_regime_an_expert() -> None:
    """y = x where x > 0 and y = -x + 1 elsewhere: two lines, and the gate learns which."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 64)[:, None]
    targets = torch.where(x > 0, x, 1 - x)
    mixture = AdaptiveMixture([nn.Linear(1, 1), nn.Linear(1, 1)], nn.Linear(1, 2))
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        # Targets in units of 0.1, the width of the Gaussians that the loss assumes to be 1.
        output = mixture(x)
        regression_loss(
            MixtureOutput(10 * output.outputs_TEO, output.logits_TE), 10 * targets, "likelihood"
        ).backward()
        optimizer.step()
    chosen = mixture(x).logits_TE.argmax(-1)
    assert set(chosen[x[:, 0] > 0.1].tolist()) | set(chosen[x[:, 0] < -0.1].tolist()) == {0, 1}
    assert len(set(chosen[x[:, 0] > 0.1].tolist())) == 1
    assert len(set(chosen[x[:, 0] < -0.1].tolist())) == 1
