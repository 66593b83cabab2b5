"""The fused expert network against its loop twin: forward, every gradient, and what is saved."""

import importlib
import itertools

import pytest
import torch

from dmoe.ops import RowMap, expert_ffn, expert_ffn_loop

CASES = list(
    itertools.product(
        ["swiglu", "gelu", "relu"],
        [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [1, 1, 1, 1]],  # rows of each expert
        # dtypes of rows and weights, and the error they make
        [
            (torch.float64, torch.float64, 1e-12),
            (torch.float32, torch.float32, 1e-5),
            (torch.bfloat16, torch.bfloat16, 1e-2),
            (torch.bfloat16, torch.float32, 1e-2),
        ],
    )
)


@pytest.mark.parametrize("backend", ["torch", "loop"])
@pytest.mark.parametrize(("activation", "counts", "precision"), CASES)
def test_equals_the_loop(activation, counts, precision, backend) -> None:
    dtype, weight_dtype, tolerance = precision
    torch.manual_seed(0)
    num_sources, dim, ffn_dim, num_rows = 6, 16, 8, sum(counts)
    rows = RowMap.from_index(torch.randint(num_sources, (num_rows,)), num_sources)
    width = 2 * ffn_dim if activation == "swiglu" else ffn_dim
    wide = torch.promote_types(dtype, torch.float32)
    shapes = [
        (num_sources, dim),
        (num_rows,),
        (len(counts), width, dim),
        (len(counts), dim, ffn_dim),
    ]
    dtypes = [dtype, wide, weight_dtype, weight_dtype]
    inputs = [
        torch.randn(s, dtype=torch.float64).to(d) for s, d in zip(shapes, dtypes, strict=True)
    ]
    dy = torch.randn(num_sources, dim, dtype=torch.float64).to(dtype)

    def run(fn, tensors, **options):
        leaves = [t.clone().requires_grad_() for t in tensors]
        x, weights, w_up, w_down = leaves
        y = fn(
            x, rows, weights, torch.tensor(counts), w_up, w_down, activation=activation, **options
        )
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return [y, *grads]

    actual = run(expert_ffn, inputs, backend=backend)
    expected = run(expert_ffn_loop, [t.double() for t in inputs])
    assert [t.dtype for t in actual] == [dtype, *dtypes]
    for got, want in zip(actual, expected, strict=True):
        error = (got.double() - want).norm()
        assert error <= tolerance * want.norm()


@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_recomputing_and_main_gradients_change_no_number(backend) -> None:
    torch.manual_seed(0)
    rows, counts = RowMap.from_index(torch.randint(6, (9,)), 6), torch.tensor([3, 0, 5, 1])
    shapes = [(6, 16), (9,), (4, 16, 16), (4, 16, 8)]
    inputs = [torch.randn(s) for s in shapes]

    def run(**options):
        leaves = [t.clone().requires_grad_() for t in inputs]
        x, weights, *both = leaves
        options |= {"activation": "swiglu", "backend": backend}
        y = expert_ffn(x, rows, weights, counts, *both, **options)
        return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]

    want = run()
    for got, expected in zip(run(recompute=True), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    # Two micro-batches are added up in float32, and the weights themselves get no gradient.
    main_grads = tuple(torch.zeros(s) for s in shapes[2:])
    for _ in range(2):
        *got, dw_up, dw_down = run(main_grads=main_grads)
        assert dw_up is None
        assert dw_down is None
        for a, b in zip(got, want, strict=False):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for got, expected in zip(main_grads, want[3:], strict=True):
        torch.testing.assert_close(got, 2 * expected)


def test_main_gradients_that_are_not_the_weights_are_refused() -> None:
    rows, counts = RowMap.from_index(torch.tensor([0, 1]), 2), torch.tensor([1, 1])
    x, w_up, w_down = torch.randn(2, 8), torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    turned = torch.zeros(2, 8, 16).transpose(1, 2)
    for wrong in (torch.zeros(2, 8, 16), turned):
        with pytest.raises(ValueError, match="main_grads must be contiguous"):
            expert_ffn(
                x,
                rows,
                torch.ones(2),
                counts,
                w_up,
                w_down,
                activation="swiglu",
                main_grads=(wrong, torch.zeros(2, 8, 8)),
            )


def test_frozen_experts_pass_gradients_and_get_none(monkeypatch) -> None:
    """Their products are not computed either."""
    rows, counts = RowMap.from_index(torch.tensor([0, 1, 1]), 2), torch.tensor([1, 2])
    tensors = [torch.randn(s) for s in ((2, 8), (3,), (2, 16, 8), (2, 8, 8))]
    results = []
    for trained in (4, 2):
        leaves = [t.clone().requires_grad_(i < trained) for i, t in enumerate(tensors)]
        x, weights, *both = leaves
        y = expert_ffn(x, rows, weights, counts, *both, activation="swiglu", backend="loop")
        y.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
        monkeypatch.delattr(importlib.import_module("dmoe.ops.expert_ffn"), "grouped_outer", False)
    for got, want in zip(results[1][:2], results[0][:2], strict=True):
        assert torch.equal(got, want)
    assert results[1][2:] == [None, None]


def test_a_second_derivative_is_refused() -> None:
    rows = RowMap.from_index(torch.tensor([0, 1]), 2)
    x = torch.randn(2, 8, requires_grad=True)
    w_up, w_down = torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    y = expert_ffn(x, rows, torch.ones(2), torch.tensor([1, 1]), w_up, w_down, activation="swiglu")
    [dx] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_takes_the_expanded_gradient_of_a_sum() -> None:
    rows = RowMap.from_index(torch.tensor([0, 1]), 2)
    x = torch.randn(2, 8, requires_grad=True)
    w_up, w_down = torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    y = expert_ffn(x, rows, torch.ones(2), torch.tensor([1, 1]), w_up, w_down, activation="swiglu")
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("recompute", [False, True])
def test_saves_x_and_the_pre_activation_alone(recompute: bool) -> None:
    """2ND + 4NKF bytes in bfloat16, beside row numbers, gates and parameters; or 2ND."""
    num_sources, top_k, dim, ffn_dim, num_experts = 64, 4, 32, 16, 8
    index = torch.arange(num_sources).repeat(top_k)
    rows = RowMap.from_index(index, num_sources)
    counts = torch.full((num_experts,), num_sources * top_k // num_experts)
    x = torch.randn(num_sources, dim, dtype=torch.bfloat16, requires_grad=True)
    w_up = torch.randn(num_experts, 2 * ffn_dim, dim, dtype=torch.bfloat16, requires_grad=True)
    w_down = torch.randn(num_experts, dim, ffn_dim, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(len(index), requires_grad=True)
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.dtype == torch.bfloat16:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        expert_ffn(x, rows, weights, counts, w_up, w_down, activation="swiglu", recompute=recompute)
    parameters = 2 * (w_up.numel() + w_down.numel())
    pre_activation = 0 if recompute else 4 * num_sources * top_k * ffn_dim
    expected = 2 * num_sources * dim + pre_activation
    assert sum(saved.values()) - parameters == expected
