import math

import pytest
import torch

from dmoe.ops.rotary import rotary_angles, rotate, rotate_loop


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_complex_multiplication(dtype, tolerance) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    cos, sin = rotary_angles(positions, 8, 100.0, dtype)
    # As attention has it: heads are a view into a wider matrix.
    x = torch.randn(2, 5, 3, 20, dtype=dtype)[..., 4:12].transpose(1, 2).requires_grad_()
    dy = torch.randn(2, 3, 5, 8, dtype=dtype)
    y, twin = rotate(x, cos, sin), rotate_loop(x, cos, sin)
    torch.testing.assert_close(y, twin, rtol=tolerance, atol=tolerance)
    (dx,), (twin_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(twin, x, dy)
    torch.testing.assert_close(dx, twin_dx, rtol=tolerance, atol=tolerance)


def test_the_first_pair_turns_by_one_radian_a_position() -> None:
    cos, sin = rotary_angles(torch.tensor([[2]]), 4, 10_000.0, torch.float64)
    y = rotate(torch.tensor([[[[1.0, 0, 0, 0]]]], dtype=torch.float64), cos, sin)
    expected = [math.cos(2), 0, math.sin(2), 0]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64))
