"""Products by oneDNN, asked for on whatever processor runs the tests, against those of torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.models import ModelConfig, build_model
from dmoe.ops import Linear, matmul
from dmoe.ops.expert_ffn import expert_ffn, expert_ffn_loop
from dmoe.ops.router_gate import router_gate, router_gate_loop
from dmoe.ops.rows import RowMap

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, ...]]:
    """Ask for oneDNN; return where the shapes of all products by it are written."""
    monkeypatch.setattr(matmul, "_ONEDNN_IS_FASTER", True)
    shapes: list[tuple[int, ...]] = []
    op = torch.ops.mkldnn._linear_pointwise

    def multiply(x: Tensor, w: Tensor, *options: object) -> Tensor:
        assert w.is_contiguous() or w.t().is_contiguous(), "oneDNN would take its reference code"
        shapes.append((*x.shape, w.shape[0]))
        return op(x, w, *options)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", multiply)
    return shapes


def views(rows: int, columns: int) -> list[Tensor]:
    """Return matrices in every memory order that a product may meet."""
    wide = torch.randn(rows, 3 * columns)
    return [
        torch.randn(rows, columns),
        torch.randn(columns, rows).t(),
        wide[:, columns : 2 * columns],
        wide[:, ::3],
        torch.randn(columns).expand(rows, columns),
        torch.randn(rows, 1).expand(rows, columns),
    ]


def check(y: Tensor, exact: Tensor) -> None:
    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "k", "n"), [(5, 7, 3), (64, 32, 48), (1, 9, 1)])
def test_products_of_views(asked, m: int, k: int, n: int) -> None:
    torch.manual_seed(0)
    for a in views(m, k):
        for b in views(k, n):
            check(matmul.mm(a, b), a.double() @ b.double())
            for out in (torch.empty(m, n), torch.empty(n, m).t()):
                assert matmul.mm(a, b, out=out) is out
                check(out, a.double() @ b.double())
    for a in views(k, m):
        for b in views(k, n):
            check(matmul.outer(a, b), a.double().t() @ b.double())
            out = torch.empty(m, n)
            assert matmul.outer(a, b, out=out) is out
            check(out, a.double().t() @ b.double())
    assert {len(shape) for shape in asked} == {3}


def test_the_narrower_factor_of_an_outer_product_is_copied(asked) -> None:
    matmul.outer(torch.randn(9, 5), torch.randn(9, 3))
    matmul.outer(torch.randn(9, 3), torch.randn(9, 5))
    assert asked == [(3, 9, 5)] * 2


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_to_multiply(asked, m: int, k: int, n: int) -> None:
    a, b = torch.randn(m, k), torch.randn(k, n)
    assert torch.equal(matmul.mm(a, b), torch.zeros(m, n))
    assert torch.equal(matmul.outer(a.t(), b), torch.zeros(m, n))
    assert torch.equal(matmul.mm(a, b, out=torch.full((m, n), torch.nan)), torch.zeros(m, n))
    assert asked == []


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_and_its_gradients(asked, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    module, x = Linear(6, 4, bias=bias), torch.randn(shape, requires_grad=True)
    dy = torch.randn(*shape[:-1], 4)
    y = module(x)
    y.backward(dy)
    leaves = [t.detach().double().requires_grad_() for t in (x, *module.parameters())]
    exact = F.linear(*leaves)
    exact.backward(dy.double())
    check(y, exact)
    for ours, leaf in zip((x, *module.parameters()), leaves, strict=True):
        assert ours.grad is not None
        check(ours.grad, leaf.grad)
    assert bool(asked) == bool(x.numel())


@pytest.mark.parametrize(("size_x", "size_y"), [(0, 4), (4, 0)])
def test_a_linear_map_of_no_width(asked, size_x: int, size_y: int) -> None:
    module, x = Linear(size_x, size_y, bias=False), torch.randn(5, size_x, requires_grad=True)
    module(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(5, size_x))
    assert torch.equal(module.weight.grad, torch.zeros(size_y, size_x))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_costs_no_product_and_no_memory(asked, frozen: str) -> None:
    module, x = Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    tensors = {"x": x, **dict(module.named_parameters())}
    tensors[frozen].requires_grad_(False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(id(t)) or t, lambda t: t):
        y = module(x)
    needed = {"x": [x], "weight": [module.weight], "bias": [x, module.weight]}
    assert kept == [id(t) for t in needed[frozen]]
    asked.clear()
    y.sum().backward()
    assert {name for name, t in tensors.items() if t.grad is None} == {frozen}
    assert len(asked) == (2 if frozen == "bias" else 1)


@pytest.mark.parametrize("tied", [True, False])
def test_logits(asked, tied: bool) -> None:
    sizes = {"vocab_size": 19, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 8}
    model = build_model(ModelConfig(**sizes, max_seq_len=8, tie_embeddings=tied))
    model.unembed(torch.randn(2, 3, 16))
    assert asked == [(2, 3, 16, 19)]


def test_weights_may_be_wider_or_narrower(asked) -> None:
    x = torch.randn(5, 6)
    for dtype in (torch.float64, torch.bfloat16):
        module = Linear(6, 4, dtype=dtype)
        y = module(x)
        check(y, F.linear(x.double(), module.weight.float().double(), module.bias.double()))
        y.sum().backward()
        assert module.weight.grad.dtype == dtype


def grads(run: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Return the output and the gradients of leaves made anew."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    y = run(*leaves)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_the_gate_of_a_router(asked) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(40, 16).to(dtype), torch.randn(8, 16)
        for ours, twin in zip(grads(router_gate, x, w), grads(router_gate_loop, x, w), strict=True):
            torch.testing.assert_close(
                ours, twin, rtol=1e-2 if ours.dtype == dtype else 1e-5, atol=1e-4
            )
    assert len(asked) == 6


@pytest.mark.parametrize("counts", [[160, 3, 30], [0, 192, 7], [0, 0, 192]])
def test_experts(asked, counts: list[int]) -> None:
    torch.manual_seed(0)
    rows = RowMap.from_index(torch.arange(sum(counts)).flip(0), sum(counts))
    leaves = (
        torch.randn(sum(counts), 16),
        torch.rand(sum(counts)),
        torch.randn(3, 48, 16),
        torch.randn(3, 16, 24),
    )

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        def call(x: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
            counts_E = torch.tensor(counts)
            return function(x, rows, gates, counts_E, up, down, activation="swiglu")

        return grads(call, *leaves)

    for ours, twin in zip(run(expert_ffn), run(expert_ffn_loop), strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)
    assert len(asked) == 6 * sum(count > 0 for count in counts)


def test_experts_with_few_rows_are_left_to_torch(asked) -> None:
    rows, counts_E = RowMap.from_index(torch.arange(4), 4), torch.tensor([1, 3])
    x, up, down = torch.randn(4, 16), torch.randn(2, 48, 16), torch.randn(2, 16, 24)
    expert_ffn(x, rows, torch.ones(4), counts_E, up, down, activation="swiglu")
    assert asked == []


def test_what_it_is_for(monkeypatch) -> None:
    monkeypatch.setattr(matmul, "_ONEDNN_IS_FASTER", True)
    assert matmul.by_onednn(CPU, torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not matmul.by_onednn(CPU, dtype)
    assert not matmul.by_onednn(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not matmul.by_onednn(CPU, torch.float32)


def test_torch_multiplies_where_nothing_was_measured(asked, monkeypatch) -> None:
    monkeypatch.setattr(matmul, "_ONEDNN_IS_FASTER", False)
    a, b = torch.randn(5, 6), torch.randn(6, 4)
    assert torch.equal(matmul.mm(a, b), a @ b)
    assert torch.equal(matmul.outer(a.t(), b), a @ b)
    Linear(6, 4)(a).sum().backward()
    assert asked == []


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "mkldnn", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, True, True),
        ("AuthenticAMD", "AVX2", True, True, False),
        ("AuthenticAMD", "AVX512", False, True, False),
        ("AuthenticAMD", "AVX512", True, False, False),
        ("GenuineIntel", "AVX512", True, True, False),
        (None, "AVX512", True, True, False),
    ],
)
def test_on_which_processors(
    monkeypatch,
    tmp_path,
    vendor: str | None,
    capability: str,
    mkl: bool,
    mkldnn: bool,
    expected: bool,
) -> None:
    processors = tmp_path / "cpuinfo"
    if vendor:
        processors.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(matmul, "Path", lambda _: processors)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert matmul._onednn_is_faster() == expected
