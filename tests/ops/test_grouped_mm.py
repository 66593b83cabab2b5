import pytest
import torch

from dmoe.ops.grouped_mm import grouped_mm, grouped_outer, resolve_backend


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [8, 0, 0]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_torch_equals_the_loop(counts, dtype, tolerance) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(sum(counts), 16, dtype=dtype), torch.randn(sum(counts), 8, dtype=dtype)
    w = torch.randn(3, 16, 8)
    for fn, args, options in (
        (grouped_mm, (a, w), {}),
        (grouped_outer, (a, b), {"dtype": torch.float32}),
    ):
        fast = fn(*args, torch.tensor(counts), backend="torch", **options)
        slow = fn(*args, torch.tensor(counts), backend="loop", **options)
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "loop"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [8, 0, 0]])
def test_rows_read_through_an_index_are_the_gathered_rows(counts, backend) -> None:
    torch.manual_seed(0)
    index, counts_E = torch.randint(4, (sum(counts),)), torch.tensor(counts)
    a, b, w = torch.randn(4, 16), torch.randn(4, 8), torch.randn(3, 16, 8)
    y = grouped_mm(a, w, counts_E, index_R=index, backend=backend)
    assert torch.equal(y, grouped_mm(a[index], w, counts_E, backend=backend))
    options = {"dtype": torch.float32, "backend": backend}
    outer = grouped_outer(a, b, counts_E, a_index_R=index, b_index_R=index, **options)
    assert torch.equal(outer, grouped_outer(a[index], b[index], counts_E, **options))


@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_an_empty_group_has_a_zero_gradient(backend) -> None:
    a, b, counts = torch.ones(2, 8), torch.ones(2, 8), torch.tensor([2, 0])
    outer = grouped_outer(a, b, counts, dtype=torch.float32, backend=backend)
    assert torch.equal(outer[1], torch.zeros(8, 8))


def test_auto_is_the_loop_on_a_cpu_and_torch_elsewhere() -> None:
    assert resolve_backend("auto", torch.device("cpu"), 8) == "loop"
    assert resolve_backend("auto", torch.device("cpu"), 128) == "torch"
    assert resolve_backend("auto", torch.device("cuda"), 8) == "torch"
    assert resolve_backend("torch", torch.device("cpu"), 8) == "torch"
