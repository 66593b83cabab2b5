"""Routing, sort and experts together, over cells that try every two values of two factors at once.

The twins are torch's, in float64; the kernels run twice, and must give the same bits.
"""

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from on_device import DEVICE, assert_close, load_by, twice  # first: it skips this file

from dmoe.ops import expert_ffn, expert_ffn_loop, sort_slots
from dmoe.ops.routing import (
    GateForm,
    select_experts,
    select_experts_torch,
    weigh_experts,
    weigh_experts_torch,
)

pytest.importorskip("dmoe_kernels.experts")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": tuple(TOLERANCE),
    "k": (1, 2, 3, 8),
    "experts": (1, 5, 8, 64),
    "tokens": (0, 1, 37, 128, 129),
    "load": ("random", "balanced", "one expert", "empty experts", "ties", "-inf logits"),
    "ffn_dim": (16, 48, 64),
    "activation": ("swiglu", "gelu", "relu"),
    "recompute": (False, True),
    "scores": ("softmax", "sigmoid"),
    "main_grads": (False, True),
    "tma": (False, True),
}
DIM = 24


class Cell(NamedTuple):
    """A value of each factor."""

    dtype: torch.dtype
    k: int
    experts: int
    tokens: int
    load: str
    ffn_dim: int
    activation: Any
    recompute: bool
    scores: Any
    main_grads: bool
    tma: bool


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(cell: Cell) -> set[Pair]:
    """Return what a cell tries: every two of its values, but without tokens only what has none."""
    pairs = set(itertools.combinations(cell._asdict().items(), 2))
    return pairs if cell.tokens else {pair for pair in pairs if ("tokens", 0) in pair}


def all_pairs() -> set[Pair]:
    """Return every two values of two factors, but for more slots than experts."""
    values = [[(name, value) for value in FACTORS[name]] for name in FACTORS]
    pairs = {pair for two in itertools.combinations(values, 2) for pair in itertools.product(*two)}
    return {pair for pair in pairs if dict(pair).get("k", 0) <= dict(pair).get("experts", 64)}


def covering_cells() -> list[Cell]:
    """Return cells that try all pairs: of some drawn around a pair still to try, the best."""
    draw, left, chosen = random.Random(0), all_pairs(), []
    while left:
        around = dict(min(left, key=str))
        drawn = (
            Cell(**{name: draw.choice(FACTORS[name]) for name in FACTORS} | around)
            for _ in range(200)
        )
        # An interpreter takes long for many experts.
        best = max(
            (cell for cell in drawn if cell.k <= cell.experts),
            key=lambda cell: len(pairs_of(cell) & left) / (8 + cell.experts),
        )
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


CELLS = covering_cells()


def test_every_pair_of_values_is_tried() -> None:
    assert list(Cell._fields) == list(FACTORS)
    assert set().union(*map(pairs_of, CELLS)) == all_pairs()


def logits_of(load: str, tokens: int, experts: int) -> torch.Tensor:
    logits = torch.randn(tokens, experts)
    if load == "balanced":
        logits[torch.arange(tokens), torch.arange(tokens) % experts] += 20
    elif load == "one expert":
        logits[:, -1] += 20
    elif load == "empty experts":
        logits[:, 1::2] -= 20
    elif load == "ties":
        logits = torch.randint(0, 2, logits.shape).float()
    elif load == "-inf logits":
        logits[:, 1::2] = -torch.inf
    return logits


def is_quick(cell: Cell) -> bool:
    return cell.experts < 64 and cell.tokens * cell.k < 130


def name_of(cell: Cell) -> str:
    return " ".join(f"{name}={value}" for name, value in cell._asdict().items())


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id=name_of(c), marks=[] if is_quick(c) else pytest.mark.slow) for c in CELLS],
)
def test_equals_the_twins(monkeypatch: pytest.MonkeyPatch, cell: Cell) -> None:
    load_by(monkeypatch, tma=cell.tma)
    torch.manual_seed(0)
    tokens, experts, ffn_dim, k = cell.tokens, cell.experts, cell.ffn_dim, cell.k
    width = 2 * ffn_dim if cell.activation == "swiglu" else ffn_dim
    logits, bias = logits_of(cell.load, tokens, experts), torch.zeros(experts)
    x = torch.randn(tokens, DIM).to(cell.dtype)
    w_up = (torch.randn(experts, width, DIM) * DIM**-0.5).to(cell.dtype)
    w_down = (torch.randn(experts, DIM, ffn_dim) * ffn_dim**-0.5).to(cell.dtype)
    dy = torch.randn(tokens, DIM).to(cell.dtype)
    sums = [torch.randn(w.shape) for w in (w_up, w_down)] if cell.main_grads else None
    form = GateForm(cell.scores, over_choice=False, normalize=True, scale=1.0)

    def by_kernels() -> list[torch.Tensor]:
        leaves = [t.to(DEVICE, copy=True).requires_grad_() for t in (x, logits, w_up, w_down)]
        x_TD, logits_TE, up, down = leaves
        ids = select_experts(logits_TE, bias.to(DEVICE), k, k, None, cell.scores)
        scores, weights = weigh_experts(logits_TE, ids, form)
        slots, rows, counts = sort_slots(ids, experts, by_triton=True)
        totals = tuple(t.to(DEVICE, copy=True) for t in sums) if sums else None
        y = expert_ffn(
            x_TD,
            rows,
            weights.flatten().index_select(0, slots),
            counts,
            up,
            down,
            activation=cell.activation,
            backend="triton",
            recompute=cell.recompute,
            main_grads=totals,
        )
        gradients = list(torch.autograd.grad(y, leaves, dy.to(DEVICE), allow_unused=bool(totals)))
        if totals:
            gradients[2:] = [new - old.to(DEVICE) for new, old in zip(totals, sums, strict=True)]
        return [ids, slots, *rows, counts, scores, weights, y, *gradients]

    def by_torch() -> list[torch.Tensor]:
        leaves = [t.double().requires_grad_() for t in (x, logits, w_up, w_down)]
        x_TD, logits_TE, up, down = leaves
        ids = select_experts_torch(logits, bias, k, k, None, cell.scores)
        scores, weights = weigh_experts_torch(logits_TE, ids, form)
        slots, rows, counts = sort_slots(ids, experts)
        gates = weights.flatten().index_select(0, slots)
        y = expert_ffn_loop(x_TD, rows, gates, counts, up, down, activation=cell.activation)
        gradients = torch.autograd.grad(y, leaves, dy.double())
        return [ids, slots, *rows, counts, scores, weights, y, *gradients]

    for got, want in zip(twice(by_kernels), by_torch(), strict=True):
        if not want.is_floating_point():
            assert torch.equal(got.cpu(), want)
        # Gates of one expert are 1 whatever the logits: their gradient is 0 but for rounding.
        elif want.norm() < 1e-9 * (1 + dy.double().norm()):
            assert got.double().norm() < 1e-4
        else:
            assert_close(got, want, TOLERANCE[cell.dtype])
