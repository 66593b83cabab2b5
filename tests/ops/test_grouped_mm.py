import pytest
import torch

from dmoe.ops.grouped_mm import grouped_mm, grouped_outer


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [8, 0, 0]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_torch_equals_the_loop(counts, dtype, tolerance) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(sum(counts), 16, dtype=dtype), torch.randn(sum(counts), 8, dtype=dtype)
    w = torch.randn(3, 16, 8, dtype=dtype)
    for fn, args in ((grouped_mm, (a, w)), (grouped_outer, (a, b))):
        fast = fn(*args, torch.tensor(counts), backend="torch")
        slow = fn(*args, torch.tensor(counts), backend="loop")
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


def test_an_empty_group_has_a_zero_gradient() -> None:
    outer = grouped_outer(torch.ones(2, 8), torch.ones(2, 8), torch.tensor([2, 0]), backend="torch")
    assert torch.equal(outer[1], torch.zeros(8, 8))
