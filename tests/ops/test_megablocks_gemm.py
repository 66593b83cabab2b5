"""The adapter to MegaBlocks; its own kernels are tested where they are installed."""

import sys
from types import SimpleNamespace

import pytest
import torch

from dmoe.ops import RowMap, expert_ffn, expert_ffn_loop
from dmoe.ops.grouped_mm import grouped_mm, grouped_mm_loop, grouped_outer, grouped_outer_loop


def gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    """Do what `grouped_gemm.backend.gmm` says of itself, with its checks of what it gets."""
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.dtype == torch.int64
    assert a.is_contiguous()
    assert b.is_contiguous()
    if trans_a:
        return grouped_outer_loop(a, b, batch_sizes)
    return grouped_mm_loop(a, b.transpose(1, 2) if trans_b else b, batch_sizes)


@pytest.fixture
def by_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the package by its contract, where there is no GPU to build it."""
    util = SimpleNamespace(backend=SimpleNamespace(gmm=gmm))
    monkeypatch.setitem(sys.modules, "megablocks", SimpleNamespace(grouped_gemm_util=util))
    monkeypatch.setitem(sys.modules, "megablocks.grouped_gemm_util", util)


@pytest.mark.usefixtures("by_its_contract")
def test_asks_for_the_right_products() -> None:
    torch.manual_seed(0)
    a, b, counts = torch.randn(8, 16), torch.randn(8, 24), torch.tensor([3, 0, 5])
    for w in (torch.randn(3, 16, 24), torch.randn(3, 24, 16).transpose(1, 2)):
        want = grouped_mm_loop(a, w, counts)
        torch.testing.assert_close(grouped_mm(a, w, counts, "megablocks"), want)
    want = grouped_outer_loop(a, b, counts)
    torch.testing.assert_close(grouped_outer(a, b, counts, "megablocks"), want)


@pytest.mark.usefixtures("by_its_contract")
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_experts_equal_the_loop(activation, monkeypatch) -> None:
    module = sys.modules["dmoe.ops.expert_ffn"]  # the package has a function of that name
    monkeypatch.setattr(module, "resolve_backend", lambda backend, *_, **__: backend)
    compare_experts(activation, torch.device("cpu"), torch.float32, 1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_parity_where_it_is_installed(activation) -> None:
    pytest.importorskip("megablocks", reason="pip install 'dmoe[megablocks]', on a GPU")
    compare_experts(activation, torch.device("cuda"), torch.bfloat16, 2e-2)


def compare_experts(activation, device, dtype, tolerance) -> None:
    """Compare output and all gradients of `expert_ffn` with those of the loop."""
    torch.manual_seed(0)
    dim, ffn_dim, counts = 16, 32, torch.tensor([5, 0, 9, 2])
    width = 2 * ffn_dim if activation == "swiglu" else ffn_dim
    rows = RowMap.from_index(torch.randint(7, (16,)), 7)
    leaves = [
        torch.randn(7, dim),
        torch.rand(16),
        torch.randn(4, width, dim) * dim**-0.5,
        torch.randn(4, dim, ffn_dim) * ffn_dim**-0.5,
    ]
    dy = torch.randn(7, dim)
    results = []
    for fn, options in ((expert_ffn, {"backend": "megablocks"}), (expert_ffn_loop, {})):
        x, weights, w_up, w_down = [
            t.to(device, torch.float32 if i == 1 else dtype).requires_grad_()
            for i, t in enumerate(leaves)
        ]
        on_device = RowMap(*(part.to(device) for part in rows))
        y = fn(
            x, on_device, weights, counts.to(device), w_up, w_down, activation=activation, **options
        )
        gradients = torch.autograd.grad(y, [x, weights, w_up, w_down], dy.to(y))
        results.append([y, *gradients])
    for got, want in zip(*results, strict=True):
        error = (got.double() - want.double()).norm()
        assert error <= tolerance * want.double().norm()
