"""Mixtral (arXiv 2401.04088): a softmax over the two experts that a token chose."""

import pytest
import torch
from narrow_presets import assert_gates_are, expert, small, with_few_experts
from torch import Tensor

from dmoe.moe import MoEContext


def gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Section 2.1: the k largest logits, a softmax over them."""
    best, ids_TK = logits_TE.topk(k)
    return ids_TK, best.softmax(-1)


def test_gates_are_those_of_the_paper() -> None:
    assert_gates_are("mixtral_8x7b", gates)


def test_the_experts_that_are_not_chosen_have_no_say() -> None:
    """Logits log 6 and log 3 make gates 2/3 and 1/3, whatever the others are below them."""
    layer = with_few_experts("mixtral_8x7b", 4)
    for low, other in ((1.0, 2.0), (2.9, 0.001)):
        x_TD = torch.tensor([[low, 6.0, other, 3.0]], dtype=torch.float64).log().requires_grad_()
        routing = layer.router(x_TD, MoEContext(seq_len=1))
        assert routing.expert_ids_TK.tolist() == [[1, 3]]
        assert routing.weights_TK.tolist() == [pytest.approx([2 / 3, 1 / 3])]
        # Exactly none: a softmax over all that is divided by its sum would leave its rounding.
        [gradient_E] = torch.autograd.grad(routing.weights_TK[0, 0], x_TD)[0].tolist()
        assert gradient_E == [0, pytest.approx(2 / 9), 0, pytest.approx(-2 / 9)]


def test_the_layer_is_the_sum_of_two_networks() -> None:
    """y = sum_i Softmax(Top2(x W_g))_i SwiGLU_i(x), with neither capacity nor shared experts."""
    config = small("mixtral_8x7b")
    assert config.capacity is None
    layer = with_few_experts("mixtral_8x7b", config.num_experts)
    x_TD = torch.randn(20, config.num_experts, dtype=torch.float64)
    y_TD, _ = layer(x_TD, MoEContext(seq_len=20))
    for x, y in zip(x_TD, y_TD, strict=True):
        best, ids = x.topk(2)
        want = sum(g * expert(layer, int(i), x) for g, i in zip(best.softmax(0), ids, strict=True))
        torch.testing.assert_close(y, want)
