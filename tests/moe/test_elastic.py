"""Elastic k: what is drawn, what it depends on, and that a layer does with it what it says."""

import itertools
import math
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from dmoe.config import ConfigError
from dmoe.metrics.moe_stats import relative_load
from dmoe.models import ModelConfig
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.moe.elastic import ElasticConfig, ElasticK
from dmoe.moe.losses import load_balance_loss
from dmoe.moe.routers import ForcedBalanceConfig, TopKConfig
from dmoe.moe.routers.base import RouterSection
from dmoe.moe.routing import make_routing

LAYERS, SEED, DRAWS = 3, 7, 4000
DISTRIBUTIONS = [
    {},
    {"distribution": "weighted"},
    {"distribution": "weighted", "temperature": 0.5},
    {"distribution": "explicit", "probabilities": [0.5, 0.0, 0.2, 0.3]},
    {"distribution": "anchored"},
    {"distribution": "anchored", "full_probability": 0.4},
]


def elastic(num_layers: int = LAYERS, seed: int = SEED, **options: Any) -> ElasticK:
    config = ElasticConfig(**{"k_min": 2, "k_max": 5, **options})
    return ElasticK(config, num_layers=num_layers, seed=seed)


def probability(k: int, ks: range, options: dict[str, Any]) -> float:
    """Define the distributions: the probability of k among `ks`, which end at k_max."""
    name = options.get("distribution", "uniform")
    if name == "weighted":
        exponent = 1 / options.get("temperature", 2)
        return k**exponent / sum(other**exponent for other in ks)
    if name == "explicit":
        given = dict(zip(range(2, 6), options["probabilities"], strict=True))
        return given[k] / sum(given[other] for other in ks)
    if name == "anchored" and len(ks) > 1:
        full = options.get("full_probability", 0.8)
        return full if k == ks[-1] else (1 - full) / (len(ks) - 1)
    return 1 / len(ks)


def assert_frequencies(seen: list[Any], expected: dict[Any, float]) -> None:
    """Allow four standard deviations; nothing that cannot be drawn may be seen."""
    assert set(seen) <= {value for value, p in expected.items() if p}
    for value, p in expected.items():
        deviation = math.sqrt(p * (1 - p) / len(seen))
        assert seen.count(value) / len(seen) == pytest.approx(p, abs=4 * deviation), value


@pytest.mark.parametrize("options", DISTRIBUTIONS)
@pytest.mark.parametrize("granularity", ["global_batch", "micro_batch", "layer", "token"])
def test_numbers_are_drawn_as_often_as_the_distribution_says(granularity, options) -> None:
    draw = elastic(granularity=granularity, **options)
    if granularity == "token":
        seen = draw.k_of_tokens(step=3, layer=1, token_ids_T=torch.arange(DRAWS)).tolist()
    else:
        seen = [draw.k(step, 0, layer=1) for step in range(DRAWS)]
    ks = range(2, 6)
    expected = {k: probability(k, ks, options) for k in ks}
    assert_frequencies(seen, expected)
    mean = sum(k * p for k, p in expected.items())
    assert draw.config.mean_k(LAYERS) == pytest.approx(mean, rel=1e-12)


def test_the_weighted_distribution_is_that_of_the_paper() -> None:
    """M-MoE trained with k from 1 to 6 and temperature 2: .092 ... .226, mean 3.96."""
    config = ElasticConfig(k_max=6, distribution="weighted")
    paper = [0.092, 0.131, 0.160, 0.185, 0.206, 0.226]
    assert config.chances(1).tolist() == pytest.approx(paper, abs=5e-4)
    assert config.mean_k(56) == pytest.approx(3.96, abs=5e-3)


@pytest.mark.parametrize(
    ("granularity", "varies_with"),
    [
        ("global_batch", {"seed", "step"}),
        ("micro_batch", {"seed", "step", "micro_batch"}),
        ("layer", {"seed", "step", "micro_batch", "layer"}),
    ],
)
def test_what_draws_a_number_of_its_own(granularity, varies_with) -> None:
    options = {"granularity": granularity, "k_min": 1, "k_max": 1000, "num_layers": 40}

    def ks(changed: str) -> set[int]:
        points = [{"seed": 1, "step": 2, "micro_batch": 3, "layer": 4} for _ in range(30)]
        for value, point in enumerate(points):
            point |= {changed: value} if changed else {}
        return {
            elastic(seed=p["seed"], **options).k(p["step"], p["micro_batch"], p["layer"])
            for p in points
        }

    assert len(ks("")) == 1, "a second draw of the same point"
    for name in ("seed", "step", "micro_batch", "layer"):
        assert (len(ks(name)) > 20) == (name in varies_with), name


def test_every_token_of_every_layer_draws_by_its_own_number() -> None:
    draw = elastic(granularity="token", k_min=1, k_max=1000)
    ids_T = torch.arange(100, 150)
    whole = draw.k_L(2, 0, ids_T)
    assert [k_T.dtype for k_T in whole] == [torch.int64] * LAYERS
    parts = [draw.k_L(2, micro_batch, ids) for micro_batch, ids in enumerate(ids_T.split(7))]
    for layer in range(LAYERS):
        assert torch.equal(whole[layer], torch.cat([part[layer] for part in parts]))
        assert len(whole[layer].unique()) > 40
        assert not torch.equal(whole[layer], whole[layer - 1])
    assert not torch.equal(whole[0], draw.k_L(3, 0, ids_T)[0])
    other = elastic(granularity="token", k_min=1, k_max=1000, seed=8)
    assert not torch.equal(whole[0], other.k_L(2, 0, ids_T)[0])


@pytest.mark.parametrize("options", [o for o in DISTRIBUTIONS if "anchored" not in o.values()])
@pytest.mark.parametrize("budget", [8, 10, 14])
def test_a_budget_is_the_draw_of_each_layer_given_the_sum(options, budget) -> None:
    """The slow twin: all compositions, each as likely as independent layers would make it."""
    ks = range(2, 6)
    compositions = {
        k_L: math.prod(probability(k, ks, options) for k in k_L)
        for k_L in itertools.product(ks, repeat=LAYERS)
        if sum(k_L) == budget
    }
    total = sum(compositions.values())
    draw = elastic(budget=budget, **options)
    seen = [draw.profile(step, micro_batch=1) for step in range(DRAWS)]
    assert_frequencies(seen, {k_L: p / total for k_L, p in compositions.items()})
    assert draw.config.mean_k(LAYERS) == budget / LAYERS
    assert [draw.k(5, 1, layer) for layer in range(LAYERS)] == list(seen[5])


@pytest.mark.parametrize(("budget", "k"), [(LAYERS * 2, 2), (LAYERS * 5, 5)])
def test_a_budget_may_leave_one_choice(budget, k) -> None:
    assert {elastic(budget=budget).profile(step, 0) for step in range(20)} == {(k,) * LAYERS}


def test_a_large_budget_is_drawn_in_no_time_and_exactly() -> None:
    draw = elastic(num_layers=94, k_min=1, k_max=8, budget=400)
    profiles = [draw.profile(step, 0) for step in range(200)]
    assert {sum(profile) for profile in profiles} == {400}
    means_L = np.mean(profiles, axis=0)
    # By symmetry each layer has 400 / 94 on average: 4.26, with a deviation of at most 2.3.
    assert abs(means_L - 400 / 94).max() < 4 * 2.3 / math.sqrt(200)


@pytest.mark.parametrize("options", DISTRIBUTIONS)
def test_the_range_widens_downwards(options) -> None:
    draw = elastic(widen_steps=9, **options)
    assert [draw.config.lowest(step) for step in range(11)] == [5, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2]
    for step, ks in ((2, range(5, 6)), (5, range(4, 6)), (8, range(3, 6)), (9, range(2, 6))):
        seen = [draw.k(step, micro_batch, 0) for micro_batch in range(DRAWS)]
        assert_frequencies(seen, {k: probability(k, ks, options) for k in ks})
    tokens = elastic(granularity="token", widen_steps=9, **options)
    assert set(tokens.k_of_tokens(4, 0, torch.arange(500)).tolist()) == {4, 5} - {
        k for k in (4, 5) if not probability(k, range(4, 6), options)
    }


MOE = {"num_experts": 8, "expert_ffn_dim": 16}
REFUSED = {
    "order": ({"k_min": 4, "k_max": 3}, "k_min = 4 .* k_max = 3"),
    "zero": ({"k_min": 0, "k_max": 3}, "greater than 0"),
    "experts": ({"k_max": 9}, r"elastic\.k_max = 9 is more than num_experts = 8"),
    "pool": ({"k_max": 4, "k_ideal": 3}, "k_ideal = 3 .* k_max = 4"),
    "large pool": ({"k_max": 4, "k_ideal": 9}, r"elastic\.k_ideal = 9 .* num_experts = 8"),
    "temperature": ({"k_max": 4, "temperature": 1}, "temperature .* distribution: weighted"),
    "probabilities": (
        {"k_max": 2, "distribution": "weighted", "probabilities": [0.5, 0.5]},
        "probabilities .* distribution: explicit",
    ),
    "full": (
        {"k_max": 2, "distribution": "uniform", "full_probability": 0.5},
        "full_probability .* distribution: anchored",
    ),
    "none": ({"k_max": 4, "distribution": "explicit"}, "needs 4 probabilities .* has 0"),
    "length": (
        {"k_min": 2, "k_max": 4, "distribution": "explicit", "probabilities": [0.5, 0.5]},
        "needs 3 probabilities .* has 2",
    ),
    "sum": (
        {"k_max": 2, "distribution": "explicit", "probabilities": [0.5, 0.6]},
        r"sum to 1.* 1\.1",
    ),
    "never": (
        {"k_max": 2, "distribution": "explicit", "probabilities": [1, 0], "widen_steps": 5},
        "widen_steps = 5 .* k_max = 2 .* probability 0",
    ),
    "budget of tokens": ({"k_max": 4, "budget": 8, "granularity": "token"}, "granularity to layer"),
    "budget of a step": (
        {"k_max": 4, "budget": 8, "granularity": "global_batch"},
        "granularity to layer",
    ),
    "budget widening": ({"k_max": 4, "budget": 8, "widen_steps": 3}, "widen_steps to 0"),
    "budget anchored": ({"k_max": 4, "budget": 8, "distribution": "anchored"}, "anchored"),
    "budget below layers": ({"k_max": 4, "budget": 3}, "budget = 3 is below 4, the number of MoE"),
    "budget below": ({"k_min": 2, "k_max": 4, "budget": 7}, "budget = 7 is not from 8 to 16"),
    "budget above": ({"k_max": 4, "budget": 17}, "budget = 17 is not from 4 to 16"),
    "budget unreachable": (
        {"k_max": 3, "budget": 7, "distribution": "explicit", "probabilities": [0.5, 0, 0.5]},
        "budget = 7 is no sum of 4 numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_reason(case) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"num_layers": 4, "moe": {**MOE, "elastic": options}})


class ExpertChoiceConfig(RouterSection):
    """Stands for a router whose experts choose."""

    takes_k: ClassVar[bool] = False

    name: Literal["expert_choice"] = "expert_choice"
    top_k: int = 2

    @property
    def fixed_k(self) -> int:
        return self.top_k


@pytest.mark.parametrize(
    ("router", "elastic", "message"),
    [
        (ExpertChoiceConfig(), {}, "elastic does not go with router.name = expert_choice"),
        ({"name": "top_p"}, {}, "elastic does not go with router.name = top_p"),
        ({"name": "forced_balance"}, {"normalize": True}, r"elastic\.normalize .* forced_balance"),
        ({"name": "forced_balance"}, {"k_ideal": 5}, r"elastic\.k_ideal .* forced_balance"),
    ],
)
def test_routers_that_cannot_do_it_are_refused(router, elastic, message) -> None:
    plain = MoEConfig(**MOE)
    chosen = router
    if isinstance(router, dict):
        chosen = MoEConfig(**MOE, router=router).router
    config = plain.model_copy(
        update={"router": chosen, "elastic": ElasticConfig(k_max=2, **elastic)}
    )
    with pytest.raises(ConfigError, match=message):
        config._router_is_elastic()


def test_expert_choice_takes_no_k_at_inference_either() -> None:
    config = ModelConfig(moe=MOE)
    experts_choose = config.moe.model_copy(update={"router": ExpertChoiceConfig()})
    config = config.model_copy(update={"moe": experts_choose})
    with pytest.raises(ConfigError, match=r"expert_choice.* leave k out"):
        config.k_of_layers(2)


def layer_with(**options: Any) -> MoELayer:
    layer = MoELayer(MoEConfig(**{**MOE, **options}), dim=8).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("normalize", [True, False])
def test_a_token_with_its_own_k_is_served_as_alone(normalize) -> None:
    layer = layer_with(elastic={"k_max": 5, "normalize": normalize})
    x_TD = torch.randn(6, 8, dtype=torch.float64)
    k_T = torch.tensor([1, 5, 2, 2, 1, 3])
    y_TD, output = layer(x_TD, MoEContext(seq_len=6, k_L=(k_T,)))
    for token, k in enumerate(k_T.tolist()):
        alone, _ = layer(x_TD[token : token + 1], MoEContext(seq_len=1, k_L=(k,)))
        torch.testing.assert_close(y_TD[token], alone[0], rtol=1e-12, atol=1e-12)
    assert output.stats.counts_E.sum() == k_T.sum()


@pytest.mark.parametrize("of_router", [True, False])
@pytest.mark.parametrize("of_elastic", [True, False, None])
def test_normalize_overrides_the_router_at_inference_too(of_router, of_elastic) -> None:
    router = {"name": "top_k", "normalize": of_router}
    layer = layer_with(router=router, elastic={"k_max": 5, "normalize": of_elastic})
    routing = layer.router(torch.randn(6, 8, dtype=torch.float64), MoEContext(seq_len=6))
    is_normal = of_router if of_elastic is None else of_elastic
    sums = routing.weights_TK.sum(1)
    assert ((sums - 1).abs().max() < 1e-12) == is_normal
    assert layer.config.router.normalize == of_router


@pytest.mark.parametrize("order", ["score_then_select", "select_then_score"])
@pytest.mark.parametrize("k", [1, torch.tensor([1, 1, 3, 1, 2, 1])], ids=["all", "some"])
def test_one_normalised_expert_gives_the_router_no_gradient(order, k) -> None:
    """Exactly none, as AdamW would make a step of a rounding error; without normalisation some."""
    for normalize in (True, False):
        router = {"name": "top_k", "order": order, "normalize": normalize}
        layer = layer_with(router=router)
        x_TD = torch.randn(6, 8, dtype=torch.float64)
        routing = layer.router(x_TD, MoEContext(seq_len=6, k_L=(k,)))
        [gradient_TE] = torch.autograd.grad(
            (routing.weights_TK * torch.randn_like(routing.weights_TK)).sum(), routing.logits_TE
        )
        has_one = torch.as_tensor(k).expand(6) == 1
        learns = not normalize and order == "score_then_select"
        assert (gradient_TE[has_one] != 0).any() == learns
        assert (gradient_TE[~has_one] != 0).any(dim=1).all()


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, torch.tensor([1, 3, 2, 4, 4, 2, 1, 3])])
def test_the_balance_loss_is_one_at_perfect_balance_for_every_k(scope, k) -> None:
    router = ForcedBalanceConfig(name="forced_balance").build(dim=3, num_experts=4).double()
    router.gate.weight.data.zero_()
    routing = router(torch.ones(8, 3).double(), MoEContext(seq_len=4, k_L=(k,)))
    totals = BatchTotals(8, 8, num_sequences=2, num_micro_batches=1)
    loss = load_balance_loss(routing, totals, scope=scope, seq_len=4, counts_E=routing.counts_E)
    assert loss.item() == pytest.approx(1, abs=1e-12)


def test_global_balance_counts_the_slots_of_micro_batches_of_different_k() -> None:
    """Two micro-batches of four tokens, k = 1 and 3; together every expert has four slots."""
    scores_TE = torch.full((4, 4), 0.25, dtype=torch.float64)
    totals = BatchTotals(8, 8, num_sequences=2, num_micro_batches=2)
    routings = [
        make_routing(scores_TE, scores_TE, ids_TK, torch.ones(ids_TK.shape))
        for ids_TK in (torch.zeros(4, 1, dtype=torch.int64), torch.tensor([[1, 2, 3]] * 4))
    ]
    counts_E = routings[0].counts_E + routings[1].counts_E
    assert counts_E.tolist() == [4, 4, 4, 4]
    shares = [
        load_balance_loss(routing, totals, scope="global_batch", seq_len=4, counts_E=counts_E)
        for routing in routings
    ]
    assert sum(shares).item() == pytest.approx(1, abs=1e-12)


def test_the_loss_free_bias_balances_while_k_varies() -> None:
    router = TopKConfig(bias_update_rate=0.003).build(dim=8, num_experts=8).double()
    generator = torch.Generator().manual_seed(0)
    router.gate.weight.data = 0.3 * torch.randn(8, 8, generator=generator).double()
    favourite_D = 2 * torch.randn(8, generator=generator).double()
    draw = ElasticK(ElasticConfig(k_max=4), num_layers=1, seed=0)
    counts_SE = []
    for step in range(400):
        x_TD = torch.randn(64, 8, generator=generator).double() + favourite_D
        k_L = draw.k_L(step, 0, torch.arange(64))
        counts_E = router(x_TD, MoEContext(seq_len=64, k_L=k_L)).counts_E
        assert counts_E.sum() == 64 * k_L[0]
        router.end_step(counts_E, 64)
        counts_SE.append(counts_E)
    first, last = (relative_load([sum(part)])[0] for part in (counts_SE[:20], counts_SE[-200:]))
    assert abs(first - 1).max() > 0.8
    assert abs(last - 1).max() < 0.1
