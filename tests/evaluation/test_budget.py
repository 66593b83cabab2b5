"""The search for layer budgets: the program against all profiles, and what a search promises."""

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from evaluated import LAYERS, batches, dataset, model_of

from dmoe.config.base import ConfigError
from dmoe.evaluation import EvalResult, calibration_batches, evaluate, search_profile
from dmoe.evaluation.budget import Measured, Profile, least_sum, swap
from dmoe.evaluation.costs import Costs, expert_costs

K_MAX = 4


def least_sum_by_hand(
    increase_LK: list[list[float]], cost_LK: list[list[float]], budget: float
) -> float | None:
    """Define `least_sum`: try every profile."""
    sums = [
        sum(increase[k] for increase, k in zip(increase_LK, ks, strict=True))
        for ks in itertools.product(*(range(len(costs)) for costs in cost_LK))
        if sum(costs[k] for costs, k in zip(cost_LK, ks, strict=True)) <= budget
    ]
    return min(sums, default=None)


def total(table_LK: list[list[float]], k_L: Profile) -> float:
    return sum(row[k - 1] for row, k in zip(table_LK, k_L, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_whole_costs_are_planned_exactly(seed: int) -> None:
    """Costs that differ from layer to layer and need not grow with k; losses that need not fall."""
    draw = random.Random(seed)
    num_layers, num_k, unit = draw.randint(1, 4), draw.randint(1, 4), draw.choice([1, 7, 10**9])
    increase_LK = [[draw.uniform(-1, 1) for _ in range(num_k)] for _ in range(num_layers)]
    cost_LK = [[unit * draw.randint(1, 9) for _ in range(num_k)] for _ in range(num_layers)]
    for budget in (unit * draw.uniform(0, 9 * num_layers) for _ in range(5)):
        expected = least_sum_by_hand(increase_LK, cost_LK, budget)
        found = least_sum(increase_LK, cost_LK, budget)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert total(cost_LK, found) <= budget
            assert total(increase_LK, found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_other_costs_are_planned_to_a_ten_thousandth(seed: int) -> None:
    """Never above the budget, and as good as all profiles within a slightly smaller one."""
    draw = random.Random(seed)
    num_layers, num_k = draw.randint(1, 4), draw.randint(1, 4)
    increase_LK = [[draw.uniform(-1, 1) for _ in range(num_k)] for _ in range(num_layers)]
    cost_LK = [[draw.uniform(0.01, 0.05) for _ in range(num_k)] for _ in range(num_layers)]
    for budget in (draw.uniform(0.01, 0.05) * num_layers for _ in range(5)):
        found = least_sum(increase_LK, cost_LK, budget)
        safe = least_sum_by_hand(increase_LK, cost_LK, budget * (1 - num_layers / 10_000))
        if found is None:
            assert safe is None
            continue
        assert total(cost_LK, found) <= budget * (1 + 1e-12)
        best = least_sum_by_hand(increase_LK, cost_LK, budget)
        assert best <= total(increase_LK, found) + 1e-12
        assert safe is None or total(increase_LK, found) <= safe + 1e-12


def test_equal_sums_take_the_cheaper_profile() -> None:
    assert least_sum([[0.0, 0.0, 0.0]] * 2, [[1, 2, 3]] * 2, 6) == (1, 1)
    assert least_sum([[0.0, -1.0, -1.0]], [[1, 2, 3]], 3) == (2,)


def test_nothing_is_within_no_budget() -> None:
    assert least_sum([[0.0]], [[1.5]], 1.4) is None
    assert least_sum([[0.0]], [[1.0]], 0.0) is None


def test_swaps_find_what_adds_up_to_nothing() -> None:
    """A loss that lies about its layers: the plan starts at the wrong end, swaps walk to it."""

    def loss(k_L: Profile) -> float:
        return abs(k_L[0] - 3) + abs(k_L[1] - 1) + 0.1 * k_L[2]

    promised_LK = [[0.0, 0.1, 0.2], [0.2, 0.1, 0.0], [0.1, 0.1, 0.1]]
    costs = Costs("experts", 0.0, ((1.0, 2.0, 3.0),) * 3)
    measured = Measured(loss)
    assert swap((1, 3, 1), measured, promised_LK, costs, 5, num_swaps=20) == (3, 1, 1)
    assert all(sum(k_L) <= 5 for k_L in measured.known)
    assert swap((1, 3, 1), measured, promised_LK, costs, 5, num_swaps=0) == (1, 3, 1)
    few = Measured(loss)
    swap((1, 3, 1), few, promised_LK, costs, 5, num_swaps=2)
    assert len(few.known) <= 3, "the start and two swaps"


def test_a_swap_that_does_not_help_is_not_kept() -> None:
    costs = Costs("experts", 0.0, ((1.0, 2.0),) * 2)
    promised_LK = [[9.0, 0.0], [0.0, 0.0]]
    loss = Measured({(1, 2): 1.0, (2, 1): 1.0}.__getitem__)
    assert swap((1, 2), loss, promised_LK, costs, 3, num_swaps=9) == (1, 2)


class Additive:
    """Stands for a model whose loss is a sum over its layers, and remembers what was asked."""

    def __init__(self, seed: int):
        draw = random.Random(seed)
        self.losses_LK = [[draw.uniform(0, 1) for _ in range(K_MAX)] for _ in range(LAYERS)]
        self.asked: list[Profile] = []

    @contextmanager
    def at_k(self, k_L: Profile) -> Iterator[None]:
        self.asked.append(k_L)
        yield

    def evaluate(self, _model: object, _batches: object) -> EvalResult:
        return EvalResult(total(self.losses_LK, self.asked[-1]), num_targets=1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [3, 5, 8, 12])
def test_where_layers_add_up_the_best_of_all_profiles_is_found(seed: int, budget: int) -> None:
    model, costs = Additive(seed), Costs("experts", 0.0, ((1.0, 2.0, 3.0, 4.0),) * LAYERS)
    with patch("dmoe.evaluation.budget.evaluate", model.evaluate):
        found = search_profile(model, [], costs, budget, num_swaps=0)  # type: ignore[arg-type]
    expected = least_sum_by_hand(model.losses_LK, [list(c) for c in costs.layers_LK], budget)
    assert found.loss == pytest.approx(expected, abs=1e-12)
    assert sum(found.k_L) <= budget


@pytest.mark.parametrize(("budget", "reference"), [(3, 1), (5, 1), (6, 2), (8, 2), (12, 4)])
def test_a_layer_is_tried_beside_the_largest_uniform_k(budget: int, reference: int) -> None:
    model, costs = Additive(0), Costs("experts", 0.0, ((1.0, 2.0, 3.0, 4.0),) * LAYERS)
    with patch("dmoe.evaluation.budget.evaluate", model.evaluate):
        search_profile(model, [], costs, budget, num_swaps=0)  # type: ignore[arg-type]
    tried = model.asked[: 1 + LAYERS * (K_MAX - 1)]
    assert (reference,) * LAYERS in tried
    assert len(set(tried)) == len(tried), "nothing is measured twice"
    assert {sum(k != reference for k in k_L) for k_L in tried} == {0, 1}


@pytest.mark.parametrize("budget", [3, 4, 6, 7, 9, 12])
def test_a_found_profile_is_within_budget_and_no_worse_than_uniform(budget: int) -> None:
    model, sample = model_of(), batches()
    found = search_profile(model, sample, expert_costs(model.config, K_MAX), budget)
    assert sum(found.k_L) == found.cost <= budget
    with model.at_k(found.k_L):
        assert evaluate(model, sample).loss == pytest.approx(found.loss, abs=1e-12)
    assert found.uniform_k == budget // LAYERS
    with model.at_k(budget // LAYERS):
        uniform = evaluate(model, sample)
    assert found.uniform_loss == pytest.approx(uniform.loss, abs=1e-12)
    assert found.loss <= found.uniform_loss
    assert found.num_targets == uniform.num_targets


def test_the_search_is_close_to_trying_every_profile() -> None:
    """On a model without training, where uniform profiles are far from the best."""
    model, sample = model_of(), batches()
    losses = {}
    for k_L in itertools.product(range(1, K_MAX + 1), repeat=LAYERS):
        if sum(k_L) <= 6:
            with model.at_k(k_L):
                losses[k_L] = evaluate(model, sample).loss
    found = search_profile(model, sample, expert_costs(model.config, K_MAX), 6)
    ranked = sorted(losses.values())
    assert found.loss == pytest.approx(losses[found.k_L], abs=1e-12)
    assert found.loss < found.uniform_loss
    assert found.loss <= ranked[len(ranked) // 10], "not among the best tenth"


def test_it_measures_as_often_as_it_says() -> None:
    model, sample = model_of(), batches()
    costs = expert_costs(model.config, 3)
    found = search_profile(model, sample, costs, 6, num_swaps=0)
    # The reference, two other k in each layer, and the plan, if it is none of these.
    assert 1 + 2 * LAYERS <= found.num_measured <= 2 + 2 * LAYERS
    more = search_profile(model, sample, costs, 6, num_swaps=2)
    assert more.num_measured <= 4 + 2 * LAYERS
    assert more.loss <= found.loss


def test_costs_that_no_uniform_profile_meets() -> None:
    """The second layer is cheap at two experts alone, as a noisy measurement may say."""
    model = model_of()
    costs = Costs("latency", 0.5, ((1.0, 2.0), (3.0, 1.0), (1.0, 2.0)))
    found = search_profile(model, batches(), costs, 3.6)
    assert found.k_L == (1, 2, 1)
    assert found.cost == 3.5
    assert found.uniform_k is None
    assert found.uniform_loss is None


def test_the_model_is_left_as_it_was() -> None:
    model, sample = model_of(), batches()
    before = evaluate(model, sample)
    search_profile(model, sample, expert_costs(model.config, 3), 5)
    assert evaluate(model, sample) == before


@pytest.mark.parametrize("budget", [2, 13, 5.5, -1, math.nan, math.inf])
def test_a_budget_without_a_choice_is_refused_before_any_work(budget: float) -> None:
    costs = expert_costs(model_of().config, K_MAX)
    with pytest.raises(ConfigError, match="budget"):
        search_profile(None, [], costs, budget)  # type: ignore[arg-type]


def test_calibration_text_is_the_start_of_the_training_order() -> None:
    sample = calibration_batches(dataset(), 3, 2)
    assert [batch.sample_ids_B.tolist() for batch in sample] == [[0, 1], [2, 3], [4, 5]]
    for batch in sample:
        for n, tokens in zip(batch.sample_ids_B.tolist(), batch.tokens_BS, strict=True):
            assert tokens.tolist() == dataset()[n].tokens.tolist()
    other = calibration_batches(dataset(seed=1), 3, 2)
    assert not other[0].tokens_BS.equal(sample[0].tokens_BS), "the order is that of the run's seed"
