"""Two-level MoE by hand, and against a loop over its levels."""

import pytest
import torch

from dmoe.moe import BatchTotals, MoEConfig, MoEContext
from dmoe.moe.losses.variation import squared_variation
from dmoe.moe.routers import HierarchicalConfig, HierarchicalRouter
from dmoe.moe.routers.hierarchical import hierarchical_load
from dmoe.moe.routers.noise import chance_of_choice, is_chosen, with_noise

TOKENS, DIM, GROUPS, SIZE = 7, 3, 3, 4


def build(**options) -> HierarchicalRouter:
    config = HierarchicalConfig(name="hierarchical", num_groups=GROUPS, **options)
    router = config.build(dim=DIM, num_experts=GROUPS * SIZE).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.normal_(generator=generator)
    return router


def test_gates_by_hand() -> None:
    """Groups log 1, log 3, so 1/4 and 3/4; in each the second expert has 2/3; one of each is used.

    The gate is the product: of one group and one expert, both softmaxes are over one entry.
    """
    config = HierarchicalConfig(name="hierarchical", num_groups=2, experts_per_group=1)
    router = config.build(dim=1, num_experts=4)
    logits = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 2.0]).log()
    router.gate.weight.data = logits[:, None]
    routing = router(torch.ones(1, 1), MoEContext(seq_len=1))
    assert routing.expert_ids_TK.tolist() == [[1, 3]]
    assert routing.weights_TK.tolist() == [pytest.approx([1 / 4, 3 / 4])]
    expected = [1 / 12, 2 / 12, 3 / 12, 6 / 12]
    assert routing.scores_TE.tolist() == [pytest.approx(expected)]


def test_load_by_hand() -> None:
    """Group 0 has two tokens: 1.5 x (0.5 + 1) / 2; group 1 has one: 1 x 0.25 / 1."""
    chance_TA = torch.tensor([[0.5, 1.0], [1.0, 0.0]])
    chance_TAB = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.0, 0.0]]])
    chosen_TA = torch.tensor([[True, True], [True, False]])
    parts = (chance_TA, chance_TAB, chosen_TA)
    together_GE = hierarchical_load(*(part[None] for part in parts))
    assert together_GE.tolist() == [[1.5 * 1.5 / 2, 1.5 * 0.5 / 2, 0.25, 0.75]]
    apart_GE = hierarchical_load(*(part[:, None] for part in parts))  # each token is a set
    assert apart_GE.tolist() == [[0.25, 0.25, 0.25, 0.75], [1, 0, 0, 0]]


def test_training_equals_a_loop_over_the_levels() -> None:
    router = build()
    totals = BatchTotals(TOKENS, TOKENS, 1, 1)
    context = MoEContext(seq_len=TOKENS, token_ids_T=torch.arange(TOKENS), totals=totals)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64)
    routing = router(x_TD, context)
    clean, std = router.gate(x_TD)
    noisy = with_noise(clean, std, context)

    gates_TE = torch.zeros(TOKENS, GROUPS * SIZE, dtype=torch.float64)
    load_E = torch.zeros(GROUPS * SIZE, dtype=torch.float64)
    top = noisy[:, :GROUPS].topk(2)
    chosen_TA = is_chosen(top.indices, GROUPS)
    primary_TA = chance_of_choice(noisy[:, :GROUPS], clean[:, :GROUPS], std[:, :GROUPS], chosen_TA)
    for group in range(GROUPS):
        rows = chosen_TA[:, group].nonzero().flatten()
        columns = slice(GROUPS + group * SIZE, GROUPS + (group + 1) * SIZE)
        noisy_rb, clean_rb, std_rb = (t[rows, columns] for t in (noisy, clean, std))
        best = noisy_rb.topk(2)
        for row, token in enumerate(rows.tolist()):
            slot = top.indices[token].tolist().index(group)
            gate = top.values[token].softmax(-1)[slot] * best.values[row].softmax(-1)
            gates_TE[token, group * SIZE + best.indices[row]] = gate
        chance = chance_of_choice(noisy_rb, clean_rb, std_rb, is_chosen(best.indices, SIZE))
        load = primary_TA[:, group].sum() * chance.sum(0) / len(rows)
        load_E[group * SIZE : (group + 1) * SIZE] = load

    dense_TE = torch.zeros_like(gates_TE)
    dense_TE.scatter_(1, routing.expert_ids_TK, routing.weights_TK)
    torch.testing.assert_close(dense_TE, gates_TE)
    torch.testing.assert_close(routing.losses["importance"], squared_variation(gates_TE.sum(0)))
    torch.testing.assert_close(routing.losses["load"], squared_variation(load_E))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, r"num_groups = 3 does not divide num_experts = 8"),
        ({"num_groups": 4, "groups_per_token": 5}, r"groups_per_token = 5 is more than .* = 4"),
        ({"num_groups": 4, "experts_per_group": 3}, r"experts_per_group = 3 is more than .* = 2"),
    ],
)
def test_bad_input(options, message) -> None:
    router = {"name": "hierarchical", **options}
    with pytest.raises(ValueError, match=message):
        MoEConfig(num_experts=8, expert_ffn_dim=8, router=router)


def test_how_many_experts_it_is_counted_with() -> None:
    config = HierarchicalConfig(name="hierarchical", num_groups=4, experts_per_group=3)
    assert (config.fixed_k, config.nominal_k(16), config.most_k(16)) == (6, 6, 6)
