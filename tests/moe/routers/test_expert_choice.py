"""Expert choice against a loop, its even load, and its leak of the future."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from dmoe.config import ConfigError
from dmoe.models import ModelConfig
from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer, Routing
from dmoe.moe.routers import ExpertChoiceConfig, ExpertChoiceRouter, Router, RouterConfig

TOKENS, SEQ_LEN, DIM, EXPERTS = 24, 8, 4, 4


def build(num_experts: int = EXPERTS, dim: int = DIM, **options: object) -> ExpertChoiceRouter:
    config = ExpertChoiceConfig(name="expert_choice", **options)
    router = config.build(dim=dim, num_experts=num_experts).double()
    generator = torch.Generator().manual_seed(1)
    router.gate.weight.data.copy_(torch.randint(-1, 2, (num_experts, dim), generator=generator))
    return router


def small_integers() -> Tensor:
    """Tokens of small integers: many logits are equal, so that ties are exercised."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-1, 2, (TOKENS, DIM), generator=generator).double()


def choose_loop(scores: Tensor, size: int, factor: float, valid: list[bool]) -> list[list[int]]:
    """Define the choice, an expert at a time: the experts of each token, the lowest first."""
    experts: list[list[int]] = [[] for _ in valid]
    for start in range(0, TOKENS, size):
        tokens = [t for t in range(start, start + size) if valid[t]]
        number = max(1, int(len(tokens) * factor / EXPERTS))
        for expert in range(EXPERTS):
            for t in sorted(tokens, key=lambda t: (-scores[t, expert].item(), t))[:number]:
                experts[t].append(expert)
    return experts


@pytest.mark.parametrize("factor", [0.1, 1.0, 2.0, 3.3, 4.0])
@pytest.mark.parametrize("group", ["sequence", "micro_batch"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loop(factor: float, group: str, padded: bool) -> None:
    valid = [not padded or (t % 3 > 0 and t < 16) for t in range(TOKENS)]  # the last group: none
    context = MoEContext(seq_len=SEQ_LEN, valid_T=torch.tensor(valid) if padded else None)
    routing = build(factor=factor, group=group)(small_integers(), context)
    size = SEQ_LEN if group == "sequence" else TOKENS
    expected = choose_loop(routing.scores_TE, size, factor, valid)
    ids = [[e for e in row if e >= 0] for row in routing.expert_ids_TK.tolist()]
    assert ids == expected
    for row, experts, scores in zip(routing.weights_TK, expected, routing.scores_TE, strict=True):
        assert row[: len(experts)].tolist() == [scores[e] for e in experts]
        assert not row[len(experts) :].any()


def test_by_hand() -> None:
    """Four tokens, two experts that take two each: tokens 0 and 3; tokens 1 and 3."""
    router = build(num_experts=2, dim=2, factor=1.0)
    router.gate.weight.data = torch.eye(2).double()
    x_TD = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]]).double()
    routing = router(x_TD, MoEContext(seq_len=4))
    assert routing.expert_ids_TK.tolist() == [[0], [1], [1], [0]]
    gates = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.exp(-0.5))]
    assert routing.weights_TK.flatten().tolist() == pytest.approx(gates)
    assert routing.counts_E.tolist() == [2, 2]


def test_no_tokens() -> None:
    for group in ("sequence", "micro_batch"):
        routing = build(group=group)(torch.zeros(0, DIM).double(), MoEContext(seq_len=SEQ_LEN))
        assert routing.counts_E.tolist() == [0] * EXPERTS


def test_a_number_of_experts_a_token_is_refused() -> None:
    moe = {"num_experts": 8, "expert_ffn_dim": 8, "router": {"name": "expert_choice"}}
    with pytest.raises(ValidationError, match="the number of experts of a token is not set"):
        MoEConfig.model_validate({**moe, "elastic": {"k_max": 2}})
    with pytest.raises(ValidationError, match=r"router.factor = 9.* is more than num_experts = 8"):
        MoEConfig.model_validate({**moe, "router": {"name": "expert_choice", "factor": 9}})
    with pytest.raises(ConfigError, match="of a token cannot be set"):
        ModelConfig.model_validate({"moe": moe}).k_of_layers(2)
    assert MoEConfig.model_validate(moe).router.warning.startswith("model.moe.router.name = exp")


def test_a_later_token_changes_what_an_earlier_one_gets() -> None:
    router, context = build(factor=1.0), MoEContext(seq_len=SEQ_LEN)
    x_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(0)).double()
    before = router(x_TD, context).expert_ids_TK
    x_TD[SEQ_LEN - 1] = 100 * x_TD[6]
    after = router(x_TD, MoEContext(seq_len=SEQ_LEN)).expert_ids_TK
    assert not torch.equal(before[: SEQ_LEN - 1], after[: SEQ_LEN - 1])
    assert torch.equal(before[SEQ_LEN:], after[SEQ_LEN:]), "another sequence is another group"


class Shuffled(Router):
    """Lets experts choose among tokens of all sequences, mixed (arXiv 2408.15664, section 5.2)."""

    def __init__(self, router: Router):
        super().__init__()
        self.router, self.gate = router, router.gate

    def forward(self, x_TD: Tensor, context: MoEContext) -> Routing:
        order = torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(context.step))
        routing = self.router(x_TD[order], context)
        back = order.argsort()
        tensors = {name: getattr(routing, name)[back] for name in routing._fields[:4]}
        return routing._replace(**tensors)


def loss_on_noise(config: RouterConfig, *, shuffled: bool = False) -> float:
    """Train to predict random bits from those before, and return the loss on fresh ones.

    Of the layer's two experts each takes one of two neighbours: a bit that was taken tells of the
    one after it.
    """
    torch.manual_seed(0)
    embed, head = nn.Embedding(2, 16), nn.Linear(16, 2)
    moe = MoEConfig(num_experts=2, expert_ffn_dim=16, router=config)
    layer = MoELayer(moe, dim=16)
    if shuffled:
        layer.router = Shuffled(layer.router)
    parameters = [*embed.parameters(), *head.parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(200):
        bits = torch.randint(2, (512, 3))  # two that are read, and one to predict
        x_TD = embed(bits[:, :2]).flatten(0, 1)
        context = MoEContext(seq_len=2, step=step, totals=BatchTotals(1024, 1024, 512, 1))
        y_TD, _ = layer(x_TD, context)
        loss = F.cross_entropy(head(x_TD + y_TD), bits[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_the_leak() -> None:
    """Random bits cost log 2 each; who pays less has looked ahead. Shuffled groups do not tell."""
    floor = math.log(2)
    choice = ExpertChoiceConfig(name="expert_choice", factor=1.0)
    assert loss_on_noise(choice) < 0.95 * floor
    assert loss_on_noise(choice, shuffled=True) > 0.99 * floor
    assert loss_on_noise(MoEConfig(num_experts=2, expert_ffn_dim=8).router) > 0.99 * floor
