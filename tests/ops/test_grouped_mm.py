import pytest
import torch

from dmoe.ops.grouped_mm import (
    grouped_mm,
    grouped_mm_loop,
    grouped_outer,
    grouped_outer_loop,
)


@pytest.mark.parametrize("backend", ["torch", "loop"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [8, 0, 0], [40, 3, 30]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equals_the_loop(backend, counts, dtype, tolerance) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(sum(counts), 16, dtype=dtype), torch.randn(sum(counts), 8, dtype=dtype)
    w, counts_E = torch.randn(3, 16, 8), torch.tensor(counts)
    for fast, slow in (
        (grouped_mm(a, w, counts_E, backend), grouped_mm_loop(a, w, counts_E)),
        (grouped_outer(a, b, counts_E, backend), grouped_outer_loop(a, b, counts_E)),
    ):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_an_empty_group_has_a_zero_gradient(backend) -> None:
    a, b, counts = torch.ones(2, 8), torch.ones(2, 8), torch.tensor([2, 0])
    assert torch.equal(grouped_outer(a, b, counts, backend)[1], torch.zeros(8, 8))
