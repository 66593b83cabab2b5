"""Hash layers: what decides the expert, and what does not."""

import dataclasses

import torch

from dmoe.models import ModelConfig, ModelInputs, build_model
from dmoe.moe import MoEContext
from dmoe.moe.routers import HashConfig

WORDS = torch.arange(4000)
CONTEXT = MoEContext(seq_len=1, vocab_ids_T=WORDS)
X = torch.zeros(len(WORDS), 1)


def experts(hash_seed: int = 0, **changes):
    router = HashConfig(name="hash", hash_seed=hash_seed).build(dim=1, num_experts=8)
    # `replace` would keep what the context has decided.
    context = dataclasses.replace(CONTEXT, replay=type(CONTEXT.replay)(), **changes)
    return router(X, context).expert_ids_TK


def test_the_word_and_the_layer_decide() -> None:
    assert torch.equal(experts(seed=1, step=2), experts(seed=3, step=4))
    assert not torch.equal(experts(layer=1), experts())
    assert not torch.equal(experts(hash_seed=1), experts())
    repeated = experts(vocab_ids_T=WORDS % 3)
    assert torch.equal(repeated[:3], repeated[3:6])


def test_words_are_spread_evenly() -> None:
    """4,000 words over 8 experts: 500 each, with a standard deviation of 21."""
    counts_E = torch.bincount(experts().flatten(), minlength=8)
    assert ((counts_E - 500).abs() < 5 * 21).all()


def test_gates_are_even_and_experts_differ() -> None:
    router = HashConfig(name="hash", top_k=2).build(dim=1, num_experts=8)
    routing = router(X, MoEContext(seq_len=1, vocab_ids_T=WORDS))
    assert (routing.weights_TK == 0.5).all()
    assert (routing.expert_ids_TK[:, 0] != routing.expert_ids_TK[:, 1]).all()


def test_a_model_knows_its_words() -> None:
    """A cached step of generation and a whole pass choose alike, so their logits agree."""
    moe = {"num_experts": 4, "expert_ffn_dim": 8, "router": {"name": "hash"}}
    model = build_model(ModelConfig(vocab_size=19, dim=16, num_layers=2, num_heads=2, moe=moe))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    output = model(ModelInputs(tokens))
    assert not list(model.moe_layers[0].router.parameters())
    again = model(ModelInputs(tokens[:, :3]))
    torch.testing.assert_close(again.logits, output.logits[:, :3])
