"""The shapes of the loop over experts; `grouped_mm` and `expert_ffn` test what it computes."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.ops import RowMap, expert_ffn, matmul


class _Products(TorchDispatchMode):
    """Keeps the shapes of the factors of every product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.mkldnn._linear_pointwise):
            self.shapes += [tuple(factor.shape) for factor in args[:2]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "by_onednn", "num_rows"),
    [
        (torch.bfloat16, False, {32, 64}),
        (torch.float32, True, {32, 64}),
        (torch.float32, False, {3, 32, 40}),
    ],
)
def test_products_by_onednn_have_few_shapes(
    monkeypatch, dtype: torch.dtype, by_onednn: bool, num_rows: set[int]
) -> None:
    monkeypatch.setattr(matmul, "_ONEDNN_IS_FASTER", by_onednn)
    counts, dim, ffn_dim = [3, 32, 40], 16, 8
    rows = RowMap.from_index(torch.arange(sum(counts)), sum(counts))
    x = torch.randn(sum(counts), dim, dtype=dtype, requires_grad=True)
    w_up = torch.randn(3, 2 * ffn_dim, dim, dtype=dtype, requires_grad=True)
    w_down = torch.randn(3, dim, ffn_dim, dtype=dtype, requires_grad=True)
    gates = torch.ones(sum(counts))
    with _Products() as products:
        y = expert_ffn(
            x,
            rows,
            gates,
            torch.tensor(counts),
            w_up,
            w_down,
            activation="swiglu",
            backend="loop",
        )
        y.float().sum().backward()
    sizes_of_weights = {dim, ffn_dim, 2 * ffn_dim}
    assert len(products.shapes) == 2 * 6 * len(counts)
    assert {n for shape in products.shapes for n in shape} - sizes_of_weights == num_rows
