"""Adaptive mixtures of local experts, to be used alone: any expert modules under a soft gate.

Paper: Jacobs, Jordan, Nowlan and Hinton, 1991.
Equations: the three losses that the paper compares: |d - sum_e p_e o_e|^2, cooperative (eq. 1.1);
    sum_e p_e |d - o_e|^2, competitive (eq. 1.2); -log sum_e p_e exp(-|d - o_e|^2 / 2), the
    likelihood of a mixture (eq. 1.3).
Config: none: `AdaptiveMixture(experts, gate)` and `regression_loss` or `classification_loss`.
Differs: for classification experts give logits of classes, and their likelihoods are mixed.
Shapes: T cases, E experts, O outputs, C classes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MixtureObjective = Literal["cooperative", "competitive", "likelihood"]


class MixtureOutput(NamedTuple):
    """What the experts make of each case, and how far the gate trusts them."""

    outputs_TEO: Tensor
    """(T, E, O) output of each expert: a prediction, or the logits of O classes."""
    logits_TE: Tensor
    """(T, E) of the gate, x_i in the paper."""

    @property
    def gates_TE(self) -> Tensor:
        """(T, E) p_i = exp(x_i) / sum_j exp(x_j)."""
        return self.logits_TE.softmax(-1)


class AdaptiveMixture(nn.Module):
    """All experts see every case; the gate weighs them."""

    def __init__(self, experts: Sequence[nn.Module], gate: nn.Module):
        """Take experts that map (T, ...) to (T, O), and a gate that maps it to (T, E) logits.

        Raises:
            ValueError: there are no experts.
        """
        if not experts:
            raise ValueError("experts is empty: a mixture needs one at least")
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate

    def forward(self, x: Tensor) -> MixtureOutput:
        """Return the outputs of all experts and the gate's logits, for (T, ...) cases.

        Raises:
            ValueError: they have other shapes than (T, O) each and (T, E).
        """
        outputs, logits_TE = [expert(x) for expert in self.experts], self.gate(x)
        shapes = sorted({tuple(output.shape) for output in outputs})
        if len(shapes) > 1 or len(shapes[0]) != 2:
            raise ValueError(
                f"the experts return shapes {', '.join(map(str, shapes))}: all must return the "
                f"same (cases, outputs)"
            )
        shape = (shapes[0][0], len(outputs))
        _check_shape("the output of the gate", logits_TE, shape, "cases, experts")
        return MixtureOutput(torch.stack(outputs, dim=1), logits_TE)

    def predict(self, x: Tensor) -> Tensor:
        """Return (T, O) sum_i p_i o_i, the mean of the mixture."""
        return blend(self(x))

    def predict_classes(self, x: Tensor) -> Tensor:
        """Return (T, C) sum_i p_i softmax(o_i), the class probabilities of the mixture."""
        output = self(x)
        return torch.einsum("te,tec->tc", output.gates_TE, output.outputs_TEO.softmax(-1))


def blend(output: MixtureOutput) -> Tensor:
    """Return (T, O) sum_i p_i o_i."""
    return torch.einsum("te,teo->to", output.gates_TE, output.outputs_TEO)


def regression_loss(
    output: MixtureOutput, targets_TO: Tensor, objective: MixtureObjective
) -> Tensor:
    """Return the mean over the cases of one of the paper's errors, for targets d.

    Args:
        output: of an `AdaptiveMixture`.
        targets_TO: (T, O) targets.
        objective: "cooperative", |d - sum_i p_i o_i|^2 (eq. 1.1); "competitive", sum_i p_i |d -
            o_i|^2 (eq. 1.2); or "likelihood", -log sum_i p_i exp(-|d - o_i|^2 / 2) (eq. 1.3).

    Raises:
        ValueError: the objective is none of these, or the targets have another shape.
    """
    _check_objective(objective)
    num_cases, _, num_outputs = output.outputs_TEO.shape
    _check_shape("targets_TO", targets_TO, (num_cases, num_outputs), "cases, outputs")
    if objective == "cooperative":
        return (targets_TO - blend(output)).square().sum(-1).mean()
    errors_TE = (targets_TO[:, None] - output.outputs_TEO).square().sum(-1)
    if objective == "competitive":
        return (output.gates_TE * errors_TE).sum(-1).mean()
    return _negative_log_likelihood(output.logits_TE, -errors_TE / 2)


def classification_loss(
    output: MixtureOutput, labels_T: Tensor, objective: MixtureObjective
) -> Tensor:
    """Return the mean over the cases of the same errors with cross-entropies for squared distances.

    Args:
        output: of an `AdaptiveMixture` whose outputs are logits.
        labels_T: (T,) int64 class of each case.
        objective: "cooperative", the cross-entropy of the blended logits sum_i p_i o_i;
            "competitive", sum_i p_i CE(o_i); or "likelihood", -log sum_i p_i softmax(o_i)_label.

    Raises:
        ValueError: the objective is none of these, or the labels have another shape.
    """
    _check_objective(objective)
    _check_shape("labels_T", labels_T, output.outputs_TEO.shape[:1], "cases")
    if objective == "cooperative":
        return F.cross_entropy(blend(output), labels_T)
    log_likelihoods_TE = _log_likelihoods(output, labels_T)
    if objective == "competitive":
        return -(output.gates_TE * log_likelihoods_TE).sum(-1).mean()
    return _negative_log_likelihood(output.logits_TE, log_likelihoods_TE)


def responsibilities(logits_TE: Tensor, log_likelihoods_TE: Tensor) -> Tensor:
    """Return (T, E) h_i, the probability that expert i made the case, once the target is known.

    Args:
        logits_TE: (T, E) of the gate.
        log_likelihoods_TE: (T, E) of the target under each expert; -|d - o_i|^2 / 2 in regression.
    """
    return (logits_TE + log_likelihoods_TE).softmax(-1)


def _check_objective(objective: str) -> None:
    known = get_args(MixtureObjective)
    if objective not in known:
        raise ValueError(f"objective = {objective!r} is not one of {', '.join(known)}")


def _check_shape(name: str, values: Tensor, shape: Sequence[int], dims: str) -> None:
    # Other shapes would broadcast, and give a loss of something else.
    if tuple(values.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, but must have {tuple(shape)}: ({dims})"
        )


def _log_likelihoods(output: MixtureOutput, labels_T: Tensor) -> Tensor:
    log_probabilities_TEC = output.outputs_TEO.log_softmax(-1)
    labels_TE1 = labels_T[:, None, None].expand(-1, log_probabilities_TEC.shape[1], 1)
    return log_probabilities_TEC.gather(-1, labels_TE1).squeeze(-1)


def _negative_log_likelihood(logits_TE: Tensor, log_likelihoods_TE: Tensor) -> Tensor:
    return -(logits_TE.log_softmax(-1) + log_likelihoods_TE).logsumexp(-1).mean()
