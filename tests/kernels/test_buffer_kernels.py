"""Buffers by the kernels: bit for bit what torch fills in, and the same sums."""

import pytest
import torch
from on_device import DEVICE, assert_close, twice  # first: it skips this file

from dmoe.ops import from_buffers, places_of, to_buffers

pytest.importorskip("dmoe_kernels.buffers")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "experts", "num_places", "dim"),
    [(37, 5, 20, 24), (1, 3, 1, 1100), (12, 4, 12, 7), (0, 3, 0, 8), (5, 2, 5, 1)],
)
def test_equals_torch(
    tokens: int, experts: int, num_places: int, dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :2]
    ids_TK = ids_TK.masked_fill(torch.rand(ids_TK.shape, generator=generator) < 0.3, -1)
    x = torch.randn(tokens, dim, generator=generator).to(dtype)
    y = torch.randn(experts * num_places, dim, generator=generator).to(dtype)

    def compute(by_triton: bool) -> list[torch.Tensor]:
        device = DEVICE if by_triton else torch.device("cpu")
        places = places_of(ids_TK.to(device), experts, num_places, by_triton=by_triton)
        leaves = [t.to(device).requires_grad_() for t in (x.clone(), y.clone())]
        filled = to_buffers(leaves[0], places, by_triton=by_triton)
        summed = from_buffers(leaves[1], places, by_triton=by_triton)
        gradients = torch.autograd.grad(
            [filled, summed], leaves, [y.to(device), x.to(device)], allow_unused=True
        )
        return [places.token_P, places.slot_P, filled, summed, *gradients]

    actual, expected = twice(lambda: compute(by_triton=True)), compute(by_triton=False)
    for got, want in zip(actual, expected, strict=True):
        if got.dtype == torch.int64:
            assert torch.equal(got.cpu(), want)
        else:
            assert_close(got, want, TOLERANCE[dtype])
    assert torch.equal(actual[2].cpu(), expected[2])
    assert torch.equal(actual[5].cpu(), expected[5])
