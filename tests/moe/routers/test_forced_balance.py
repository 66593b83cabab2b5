import pytest
import torch

from dmoe.moe import MoEContext
from dmoe.moe.routers import ForcedBalanceConfig


@pytest.mark.parametrize(("num_tokens", "top_k"), [(8, 1), (8, 3), (4, 4), (5, 3), (0, 2)])
def test_every_expert_gets_the_same(num_tokens, top_k) -> None:
    num_experts = 4
    config = ForcedBalanceConfig(name="forced_balance", top_k=top_k)
    router = config.build(dim=3, num_experts=num_experts)
    torch.nn.init.normal_(router.gate.weight)
    routing = router(torch.randn(num_tokens, 3), MoEContext(seq_len=num_tokens))
    spread = routing.counts_E.max() - routing.counts_E.min()
    assert spread == (num_tokens * top_k % num_experts > 0)
    assert routing.counts_E.sum() == num_tokens * top_k
    assert all(len(set(ids)) == top_k for ids in routing.expert_ids_TK.tolist())
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(num_tokens))


def test_padding_goes_nowhere() -> None:
    router = ForcedBalanceConfig(name="forced_balance").build(dim=3, num_experts=4)
    torch.nn.init.normal_(router.gate.weight)
    valid_T = torch.tensor([True, False, True])
    routing = router(torch.randn(3, 3), MoEContext(seq_len=3, valid_T=valid_T))
    assert routing.expert_ids_TK.tolist() == [[0, 1], [-1, -1], [0, 1]]
    assert routing.weights_TK[1].tolist() == [0, 0]


@pytest.mark.parametrize("k", [1, 3, torch.tensor([2, 1, 4, 1, 3, 2])])
def test_it_obeys_the_context(k) -> None:
    """The tokens are dealt to the experts in turn, whatever number each of them takes."""
    router = ForcedBalanceConfig(name="forced_balance").build(dim=3, num_experts=4)
    torch.nn.init.normal_(router.gate.weight)
    routing = router(torch.randn(6, 3), MoEContext(seq_len=6, k_L=(k,)))
    ids_TK = routing.expert_ids_TK
    k_T = torch.as_tensor(k).expand(6)
    assert torch.equal((ids_TK >= 0).sum(1), k_T)
    assert ids_TK[ids_TK >= 0].tolist() == [slot % 4 for slot in range(int(k_T.sum()))]
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(6))
    assert not routing.weights_TK[ids_TK < 0].any()
