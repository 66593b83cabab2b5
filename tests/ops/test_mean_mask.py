"""The collapsed mask against masks in full, and the masked activation against autograd."""

import pytest
import torch

from dmoe.ops.activation import activate
from dmoe.ops.mean_mask import masked_activation, mean_mask, mean_mask_loop
from dmoe.ops.top_mask import pack_bits, top_mask

TOKENS, SAMPLES, LATENT, NEURONS = 7, 3, 5, 16


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def choose(k: int, logits_TF: torch.Tensor) -> torch.Tensor:
    return pack_bits(top_mask(logits_TF, 4))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, 0])
def test_the_mean_mask_is_the_mean_of_masks(hard, tokens) -> None:
    z_TKZ, w_FZ = draw(tokens, SAMPLES, LATENT), draw(NEURONS, LATENT)
    results = []
    for compute in (mean_mask, mean_mask_loop):
        mean_TF = compute(z_TKZ, w_FZ, choose=choose, hard=hard, scale=1.7)
        dmean_TF = torch.linspace(-1, 1, mean_TF.numel(), dtype=torch.float64).view_as(mean_TF)
        results.append((mean_TF, *torch.autograd.grad(mean_TF, (z_TKZ, w_FZ), dmean_TF)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if hard and tokens:
        assert set((results[0][0] * SAMPLES / 1.7).round().flatten().tolist()) == {0, 1, 2, 3}


def test_one_bit_a_neuron_and_sample_is_kept() -> None:
    z_TKZ, w_FZ = draw(TOKENS, SAMPLES, LATENT), draw(NEURONS, LATENT)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        mean_mask(z_TKZ, w_FZ, choose=choose, hard=False, scale=1.0)
    inputs = {z_TKZ.data_ptr(), w_FZ.data_ptr()}
    bits = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    assert sum(tensor.nbytes for tensor in bits) * 8 == TOKENS * SAMPLES * NEURONS


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_masked_activation(activation) -> None:
    width = 2 * NEURONS if activation == "swiglu" else NEURONS
    hidden_TH, mask_TF = draw(TOKENS, width), draw(TOKENS, NEURONS)
    results = []
    for a_TF in (
        masked_activation(hidden_TH, mask_TF, activation),
        activate(hidden_TH, activation) * mask_TF,
    ):
        da_TF = torch.linspace(-1, 1, a_TF.numel(), dtype=torch.float64).view_as(a_TF)
        results.append((a_TF, *torch.autograd.grad(a_TF, (hidden_TH, mask_TF), da_TF)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_narrow_activations_under_a_wide_mask() -> None:
    hidden_TH, mask_TF = draw(TOKENS, 2 * NEURONS).bfloat16(), draw(TOKENS, NEURONS).float()
    hidden_TH, mask_TF = (t.detach().requires_grad_() for t in (hidden_TH, mask_TF))
    a_TF = masked_activation(hidden_TH, mask_TF, "swiglu")
    assert a_TF.dtype == torch.bfloat16
    a_TF.float().sum().backward()
    assert (hidden_TH.grad.dtype, mask_TF.grad.dtype) == (torch.bfloat16, torch.float32)
