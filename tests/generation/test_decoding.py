"""Batches, caches and ranks never change a continuation; the twin is a loop without any of them."""

import math

import pytest
import torch
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.data.tokenizer import ByteTokenizer
from dmoe.generation import SamplingConfig, generate, sample_next
from dmoe.generation.sampling import draws
from dmoe.models import DecoderLM, ModelConfig, ModelInputs, build_model
from dmoe.models.attention import KVCache
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

BYTES = ByteTokenizer()
PROMPTS = ["a", "The quick brown fox", "é€", "def f(x):\n    return", "a"]
SIZES = {"dim": 16, "num_layers": 3, "num_heads": 4, "ffn_dim": 24, "max_seq_len": 64}
MOE = {
    "num_experts": 6,
    "expert_ffn_dim": 8,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "router": {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01},
}
# Weights of this size make the model's choices vary from token to token.
CONFIGS = {
    "llama moe": {"moe": MOE, "num_kv_heads": 2, "qk_norm": "head", "init_std": 0.3},
    "gpt2 moe": {"moe": MOE, "family": "gpt2", "tie_embeddings": True, "init_std": 0.3},
    "llama dense": {"init_std": 0.3},
    # More ids than the tokenizer has, and most experts without a row.
    "padded vocabulary": {
        "vocab_size": 320,
        "init_std": 0.3,
        "moe": {**MOE, "num_experts": 32, "router": {"name": "top_k", "top_k": 1}},
    },
}
SAMPLINGS = {
    "greedy": SamplingConfig(max_new_tokens=16, temperature=0),
    "sampled": SamplingConfig(max_new_tokens=16, temperature=0.8, top_k=40, top_p=0.9, seed=7),
}


def model_of(name: str, dims: ParallelDims | None = None) -> DecoderLM:
    config = ModelConfig.model_validate({**SIZES, **CONFIGS[name]})
    return build_model(config, dims=dims, compute_dtype=torch.float64, seed=11)


def continue_alone(
    model: DecoderLM, prompt: str, copies_before: int, sampling: SamplingConfig
) -> list[int]:
    """Define `generate`: read everything again for every token, one prompt, no padding."""
    ids = BYTES.encode(prompt).tolist()
    new: list[int] = []
    uniform_N = draws([prompt] * (copies_before + 1), sampling)[-1]
    for uniform in uniform_N:
        with torch.no_grad():
            logits = model(ModelInputs(torch.tensor([ids + new]))).logits[:, -1, :257]
        token = sample_next(logits, uniform[None], sampling).item()
        if token == BYTES.eod_id:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_equals_each_prompt_alone_without_a_cache(name, sampling):
    model = model_of(name)
    results = generate(model, BYTES, PROMPTS, sampling)
    expected = [
        continue_alone(model, prompt, PROMPTS[:index].count(prompt), sampling)
        for index, prompt in enumerate(PROMPTS)
    ]
    assert [result.tokens for result in results] == expected
    assert len({tuple(tokens) for tokens in expected}) > 2, "the model tells the prompts apart"
    for result, tokens in zip(results, expected, strict=True):
        full = len(tokens) == sampling.max_new_tokens
        assert result.finish_reason == ("length" if full else "end_of_document")
        assert result.text == BYTES.decode(tokens)
        assert result.tokens_per_second > 0


@pytest.mark.parametrize(("k", "threshold"), [(1, 0), ([5, 1], 0), ([1, 6], 0), (4, 0.4)])
def test_at_any_k_the_cache_changes_nothing(k, threshold):
    """The model reads prompt and new tokens at the same k, with a cache or as one whole."""
    model, sampling = model_of("llama moe"), SAMPLINGS["greedy"]
    own = [result.tokens for result in generate(model, BYTES, PROMPTS, sampling)]
    model.set_k(k)
    model.set_gate_threshold(threshold)
    found = [result.tokens for result in generate(model, BYTES, PROMPTS, sampling)]
    assert found == [continue_alone(model, prompt, 0, sampling) for prompt in PROMPTS]
    assert found != own


def test_a_prompt_in_any_batch_is_continued_alike():
    model, sampling = model_of("llama moe"), SAMPLINGS["sampled"]
    batch = generate(model, BYTES, PROMPTS, sampling)
    for index, prompt in enumerate(PROMPTS[:4]):
        assert generate(model, BYTES, [prompt], sampling)[0].tokens == batch[index].tokens
    assert batch[0].tokens != batch[4].tokens, "copies of a prompt are continued differently"


def test_the_cache_gives_the_logits_of_a_whole_pass():
    """In several pieces, with padding on the left and a sequence that ends on the way."""
    model = model_of("llama moe")
    tokens = torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(3, 12, dtype=torch.int64)
    documents[1, :4] = -1
    documents[2, 9:] = -1
    positions = ((documents == 0).cumsum(1) - 1).clamp(min=0)
    caches = [
        KVCache.allocate(
            model.config,
            batch_size=3,
            max_len=12,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        for _ in model.blocks
    ]
    pieces: list[Tensor] = []
    routed = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        whole = model(ModelInputs(tokens, positions, documents))
        for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
            inputs = ModelInputs(tokens[:, start:end], positions[:, start:end], documents[:, :end])
            output = model(inputs, caches=caches)
            pieces.append(output.logits)
            routed += torch.stack([layer.stats.counts_E.sum() for layer in output.moe])
    valid = documents == 0
    assert torch.cat(pieces, dim=1)[valid].allclose(whole.logits[valid], rtol=0, atol=1e-12)
    assert routed.tolist() == [2 * int(valid.sum())] * 2, "padding went to an expert"


def test_cached_positions_and_mask_need_not_be_given():
    model = model_of("gpt2 moe")
    tokens = torch.randint(257, (2, 7), generator=torch.Generator().manual_seed(0))
    caches = [
        KVCache.allocate(
            model.config, batch_size=2, max_len=7, dtype=torch.float64, device=torch.device("cpu")
        )
        for _ in model.blocks
    ]
    with torch.no_grad():
        first = model(ModelInputs(tokens[:, :4]), caches=caches).logits
        last = model(ModelInputs(tokens[:, 4:]), caches=caches, last_only=True).logits
        whole = model(ModelInputs(tokens)).logits
    assert first.allclose(whole[:, :4], rtol=0, atol=1e-12)
    assert last.allclose(whole[:, -1:], rtol=0, atol=1e-12)


class Script(torch.nn.Module):
    """A model that says what it is told, a text for each row, whatever it reads."""

    def __init__(self, texts: list[list[int]]):
        super().__init__()
        self.config = ModelConfig(**SIZES)
        self.compute_dtype = torch.float32
        self.embed = torch.nn.Embedding(1, 1)
        self.blocks: list[torch.nn.Module] = []
        self.texts = texts
        self.step = 0
        self.seen: list[ModelInputs] = []

    def forward(self, inputs, *, caches, last_only):
        self.seen.append(inputs)
        logits = torch.full((len(self.texts), 1, 257), -math.inf).fill_(-100.0)
        for row, text in enumerate(self.texts):
            logits[row, 0, text[min(self.step, len(text) - 1)]] = 100.0
        self.step += 1
        return type("Output", (), {"logits": logits})


GREEDY = SamplingConfig(max_new_tokens=20, temperature=0)


def test_each_way_to_end():
    script = Script([list(b"one\nEND two"), [*b"ab", BYTES.eod_id], list(b"and so on. ")])
    pieces: list[list[str]] = [[], [], []]
    results = generate(
        script,
        BYTES,
        ["x", "yy", "zzz"],
        GREEDY.model_copy(update={"stop": ("\nEND", "?"), "max_new_tokens": 9}),
        on_text=lambda index, piece: pieces[index].append(piece),
    )
    assert [(r.text, r.finish_reason) for r in results] == [
        ("one", "stop"),
        ("ab", "end_of_document"),
        ("and so on", "length"),
    ]
    assert [len(r.tokens) for r in results] == [7, 2, 9]
    assert ["".join(piece) for piece in pieces] == [r.text for r in results]
    assert pieces[1] == ["a", "b"], "text comes as soon as it is certain"
    assert results[1].seconds < results[0].seconds < results[2].seconds
    # Three tokens of prompt, then a column a token; what has ended is padding from then on.
    assert script.seen[-1].document_ids.tolist() == [
        [-1, -1, 0, 0, 0, 0, 0, 0, 0, -1, -1],
        [-1, 0, 0, 0, 0, *[-1] * 6],
        [0] * 11,
    ]


def test_the_batch_ends_with_its_last_sequence():
    script = Script([[BYTES.eod_id], [*b"abc", BYTES.eod_id]])
    generate(script, BYTES, ["x", "y"], GREEDY)
    assert script.step == 4


def test_a_character_cut_off_by_the_end_is_replaced():
    pieces: list[str] = []
    (result,) = generate(
        Script([[*"a€".encode()]]),
        BYTES,
        ["x"],
        GREEDY.model_copy(update={"max_new_tokens": 3}),
        on_text=lambda _, piece: pieces.append(piece),
    )
    assert result.text == "a�"
    assert pieces == ["a", "�"]


def test_no_prompts():
    assert generate(model_of("llama dense"), BYTES, [], GREEDY) == []


def test_a_prompt_may_fill_the_model_but_not_more():
    model = model_of("gpt2 moe")
    (result,) = generate(model, BYTES, ["x" * 44], GREEDY)
    assert result.tokens
    with pytest.raises(ConfigError, match=r"prompt 1 has 45 tokens.*20.*max_seq_len = 64"):
        generate(model, BYTES, ["x", "x" * 45], GREEDY)


def test_bad_input_is_named():
    model = model_of("llama dense")
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        generate(model, BYTES, ["x", ""], GREEDY)
    small = build_model(ModelConfig(**SIZES, vocab_size=100))
    with pytest.raises(ConfigError, match=r"bytes has 257 ids.*vocab_size = 100"):
        generate(small, BYTES, ["x"], GREEDY)


def test_damaged_weights_are_not_sampled_from():
    model = model_of("llama dense")
    model.norm.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, BYTES, ["x"], GREEDY)


def generate_sharded() -> list[list[int]]:
    dims = ParallelDims.create(ep=2)
    model = model_of("llama moe", dims)
    results = generate(model, BYTES, PROMPTS, SAMPLINGS["sampled"], group=dims.world_group)
    return [result.tokens for result in results]


def test_experts_on_two_ranks():
    expected = generate(model_of("llama moe"), BYTES, PROMPTS, SAMPLINGS["sampled"])
    for tokens in run_distributed(generate_sharded, 2):
        assert tokens == [result.tokens for result in expected]
