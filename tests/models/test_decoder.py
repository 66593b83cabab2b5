"""What a decoder language model promises, for both families, with MoE layers, in float64."""

import pytest
import torch
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.models import DecoderLM, ModelInputs, lm_loss
from dmoe.models.attention import KVCache
from dmoe.moe import BatchTotals, MoEContext
from dmoe.moe.routers import choice

FAMILIES = [
    pytest.param({"family": "gpt2"}, id="gpt2"),
    pytest.param({"family": "llama", "num_kv_heads": 2, "qk_norm": "head"}, id="llama"),
]


def random_tokens(batch: int, seq_len: int) -> Tensor:
    return torch.randint(19, (batch, seq_len), generator=torch.Generator().manual_seed(0))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", FAMILIES)
def test_a_later_token_changes_no_earlier_logits(options, small_model) -> None:
    model, tokens = small_model(**options), random_tokens(2, 8)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 19
    before, after = (model(ModelInputs(t)).logits for t in (tokens, changed))
    assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amin(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("options", FAMILIES)
def test_packed_documents_do_not_see_each_other(options, small_model) -> None:
    """Two documents and padding in one window: each gives the logits that it gives alone."""
    model = small_model(**options)
    first, second, padding = random_tokens(1, 5), random_tokens(1, 4) + 3, random_tokens(1, 3)
    packed = ModelInputs(
        torch.cat([first, second % 19, padding], dim=1),
        positions=torch.tensor([[*range(5), *range(4), *range(3)]]),
        document_ids=torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3]),
    )
    output = model(packed)
    assert_close(output.logits[:, :5], model(ModelInputs(first)).logits)
    assert_close(output.logits[:, 5:9], model(ModelInputs(second % 19)).logits)
    assert output.logits.isfinite().all()
    assert [layer.stats.counts_E.sum().item() for layer in output.moe] == [18, 18], "9 tokens"


def empty_caches(model: DecoderLM, batch: int) -> list[KVCache]:
    config = model.config
    shape = (batch, config.kv_heads, 12, config.width_of_head)
    return [
        KVCache(torch.zeros(shape).double(), torch.zeros(shape).double())
        for _ in range(config.num_layers)
    ]


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 5], [10]])
def test_decoding_with_a_cache_equals_the_whole_forward_pass(options, chunks, small_model) -> None:
    model, tokens = small_model(**options), random_tokens(2, 10)
    caches = empty_caches(model, batch=2)
    with torch.no_grad():
        parts = [model(ModelInputs(part), caches=caches).logits for part in tokens.split(chunks, 1)]
        assert_close(torch.cat(parts, dim=1), model(ModelInputs(tokens)).logits)
    assert [cache.length for cache in caches] == [10] * model.config.num_layers


@pytest.mark.parametrize("options", FAMILIES)
def test_prompts_of_two_lengths_decode_as_each_alone(options, small_model) -> None:
    """The shorter prompt is padded on the left, in the cache as well."""
    model, tokens, padding = small_model(**options), random_tokens(2, 8), 3
    document_ids = torch.zeros(2, 8, dtype=torch.int64)
    document_ids[0, :padding] = -1
    positions = torch.stack([(torch.arange(8) - padding).clamp(min=0), torch.arange(8)])
    caches, parts = empty_caches(model, batch=2), []
    with torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 8)):
            here = slice(start, end)
            inputs = ModelInputs(tokens[:, here], positions[:, here], document_ids[:, :end])
            parts.append(model(inputs, caches=caches).logits)
        logits = torch.cat(parts, dim=1)
        assert_close(logits[:1, padding:], model(ModelInputs(tokens[:1, padding:])).logits)
        assert_close(logits[1:], model(ModelInputs(tokens[1:])).logits)


def loss_and_gradients(model: DecoderLM, recompute: str) -> list[Tensor]:
    tokens = random_tokens(2, 8)
    totals = BatchTotals(num_tokens=16, num_targets=14, num_sequences=2, num_micro_batches=1)
    context = MoEContext(seq_len=8, totals=totals)
    output = model(ModelInputs(tokens), context, recompute=recompute)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = lm_loss(output.logits, labels) / totals.num_targets
    loss = loss + sum(sum(layer.losses.values()) for layer in output.moe)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient_and_no_routing(
    options, recompute, small_model, monkeypatch
) -> None:
    model = small_model(**options)
    choose = choice.top_k_ids
    calls: list[int] = []

    def counted(scores_TE: Tensor, k: int) -> Tensor:
        calls.append(k)
        return choose(scores_TE, k)

    monkeypatch.setattr(choice, "top_k_ids", counted)
    straight = loss_and_gradients(model, "none")
    assert len(calls) == len(model.moe_layers) == 2
    again = loss_and_gradients(model, recompute)
    assert len(calls) == 4
    for got, want in zip(again, straight, strict=True):
        assert torch.equal(got, want)


def test_recompute_saves_what_it_says(small_model) -> None:
    """Full keeps less than selective, and that less than none."""

    def saved_bytes(recompute: str) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        model = small_model()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(ModelInputs(random_tokens(8, 32)), recompute=recompute)
        del output
        return sum(sizes.values())

    assert saved_bytes("full") < saved_bytes("selective") < saved_bytes("none")


def test_tied_embeddings_are_one_matrix(small_model) -> None:
    tied, untied = small_model(tie_embeddings=True), small_model()
    names = dict(tied.named_parameters())
    assert dict(untied.named_parameters()).keys() - names == {"lm_head.weight"}
    assert tied.state_dict().keys() == untied.state_dict().keys() - {"lm_head.weight"}

    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.embed.weight})
    inputs = ModelInputs(random_tokens(2, 6))
    outputs = [model(inputs).logits for model in (tied, untied)]
    assert_close(*outputs)
    for logits in outputs:
        logits.square().sum().backward()
    assert_close(tied.embed.weight.grad, untied.embed.weight.grad + untied.lm_head.weight.grad)


def test_the_loss_is_a_sum_in_nats_over_the_labels_that_count() -> None:
    logits = torch.tensor([[[1.0, 2.0, 5.0], [1.0, 1.0, 1.0], [9.0, 1.0, 1.0]]]).log().bfloat16()
    labels = torch.tensor([[2, 0, -100]])
    loss = lm_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.tensor([8 / 5, 3.0]).log().sum().item(), rel=1e-2)
    assert lm_loss(logits, torch.full((1, 3), -100)).item() == 0


@pytest.mark.parametrize("options", FAMILIES)
def test_bfloat16_computes_on_float32_masters(options, small_model) -> None:
    model = small_model(torch.bfloat16, **options)
    output = model(ModelInputs(random_tokens(2, 6)))
    assert output.logits.dtype == torch.bfloat16
    output.logits.float().square().mean().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", FAMILIES)
def test_bfloat16_is_close_to_float32(options, small_model) -> None:
    inputs = ModelInputs(random_tokens(2, 6))
    options = {**options, "moe": None}  # a router may choose otherwise in the last bit
    narrow, wide = (
        small_model(dtype, **options)(inputs).logits.float()
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert (narrow - wide).norm() < 0.02 * wide.norm()


def test_number_of_parameters_by_hand(small_model) -> None:
    dim, ffn, vocab, expert, experts = 16, 24, 19, 8, 4
    moe = experts * dim + experts * 3 * dim * expert + 3 * dim * expert  # router, experts, shared
    attention = dim * dim + 2 * dim * (dim // 2) + dim * dim + 2 * 4  # q, k and v, o, q/k norms
    llama = small_model(num_kv_heads=2, qk_norm="head")
    layers = 3 * (attention + 2 * dim) + 3 * dim * ffn + 2 * moe
    assert sum(p.numel() for p in llama.parameters()) == 2 * vocab * dim + layers + dim

    gpt2 = small_model(family="gpt2", moe=None, tie_embeddings=True)
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    layers = 3 * (attention + 4 * dim + 2 * dim * ffn + ffn + dim)
    total = vocab * dim + 32 * dim + layers + 2 * dim
    assert sum(p.numel() for p in gpt2.parameters()) == total


def test_moe_layers_are_where_the_configuration_says(small_model) -> None:
    model = small_model(num_layers=4, moe={"num_experts": 2, "expert_ffn_dim": 8, "every": 2})
    assert [block.moe is not None for block in model.blocks] == [False, True, False, True]
    assert model.config.moe_layers == [1, 3]
    assert len(model.moe_layers) == len(model(ModelInputs(random_tokens(1, 4))).moe) == 2


def slots_of_layers(model: DecoderLM, context: MoEContext | None = None) -> list[float]:
    """Return the experts per token in each MoE layer."""
    with torch.no_grad():
        output = model(ModelInputs(random_tokens(2, 8)), context)
    return [layer.stats.counts_E.sum().item() / 16 for layer in output.moe]


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_model_at_k_is_the_model_with_that_top_k(options, k, small_model) -> None:
    moe = small_model().config.moe.model_dump()
    trained = small_model(**options)
    routed = {**moe, "router": {**moe["router"], "top_k": k}}
    other = small_model(**options, moe=routed)
    other.load_state_dict(trained.state_dict())
    inputs = ModelInputs(random_tokens(2, 8))
    own = trained(inputs).logits
    trained.set_k(k)
    assert torch.equal(trained(inputs).logits, other(inputs).logits)
    assert not trained(inputs).logits.allclose(own)
    trained.set_k(None)
    assert torch.equal(trained(inputs).logits, own)


def test_each_layer_may_have_its_own_k(small_model) -> None:
    model = small_model()
    assert slots_of_layers(model) == [2, 2]
    model.set_k([4, 1])
    assert slots_of_layers(model) == [4, 1]
    model.set_k(3)
    assert slots_of_layers(model) == [3, 3]
    assert slots_of_layers(model, MoEContext(seq_len=8, k_L=(1, 2))) == [1, 2], "a context wins"


def test_a_k_for_a_while_ends_whatever_happens(small_model) -> None:
    model = small_model()
    model.set_k(3)
    with model.at_k([4, 1]):
        assert slots_of_layers(model) == [4, 1]
        with model.at_k(None):
            assert slots_of_layers(model) == [2, 2]
        assert slots_of_layers(model) == [4, 1]
    assert slots_of_layers(model) == [3, 3]
    with pytest.raises(ConfigError), model.at_k(9):
        pass
    with pytest.raises(ZeroDivisionError), model.at_k(1):
        raise ZeroDivisionError
    assert slots_of_layers(model) == [3, 3]


@pytest.mark.parametrize(
    ("k", "facts"),
    [
        (0, ["k = 0", "from 1 to model.moe.num_experts = 4"]),
        (5, ["k = 5", "from 1 to model.moe.num_experts = 4"]),
        ([2, 5], ["k = 5"]),
        ([2, 2, 2], ["[2, 2, 2] has 3 numbers", "2 MoE layers"]),
        ([], ["has 0 numbers"]),
    ],
)
def test_a_k_that_the_model_has_not_is_refused(k, facts, small_model) -> None:
    model = small_model()
    with pytest.raises(ConfigError) as caught:
        model.set_k(k)
    assert all(fact in str(caught.value) for fact in facts)
    assert slots_of_layers(model) == [2, 2]


def test_a_gate_threshold_goes_to_every_layer_and_any_k(small_model) -> None:
    model = small_model()
    model.set_gate_threshold(0.9)
    assert all(1 <= used < 2 for used in slots_of_layers(model))
    with model.at_k([4, 1]):
        first, second = slots_of_layers(model)
    assert 1 <= first < 4
    assert second == 1
    expected = slots_of_layers(model, MoEContext(seq_len=8, gate_threshold=0.9))
    assert slots_of_layers(model) == expected
    model.set_gate_threshold(0)
    assert slots_of_layers(model) == [2, 2]


def test_a_gate_threshold_is_refused_where_it_has_no_meaning(small_model) -> None:
    model = small_model()
    for threshold in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"not in \[0, 1\)"):
            model.set_gate_threshold(threshold)
    with pytest.raises(ConfigError, match="dense"):
        small_model(moe=None).set_gate_threshold(0.5)
    forced = {"num_experts": 4, "expert_ffn_dim": 8, "router": {"name": "forced_balance"}}
    with pytest.raises(ConfigError, match="forced_balance"):
        small_model(moe=forced).set_gate_threshold(0.5)
    model.set_gate_threshold(0.5)
    with pytest.raises(ConfigError, match="for inference"):
        loss_and_gradients(model, "none")
