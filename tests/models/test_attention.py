"""Attention against a loop over heads and positions, with rotation by complex numbers."""

import math

import pytest
import torch
from torch import Tensor

from dmoe.models import ModelConfig
from dmoe.models.attention import (
    Attention,
    AttentionInputs,
    KVCache,
    packed_mask,
)
from dmoe.ops import rotary_angles

DIM, HEADS, WIDTH, SEQ_LEN = 12, 4, 6, 5
POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1]])


def build(**options) -> Attention:
    config = ModelConfig(dim=DIM, num_heads=HEADS, head_dim=WIDTH, **options)
    attention = Attention(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data.normal_(generator=generator)
    return attention


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, SEQ_LEN, DIM, generator=generator, dtype=torch.float64)


def inputs() -> AttentionInputs:
    cos, sin = rotary_angles(POSITIONS, WIDTH, 100.0, torch.float64)
    return AttentionInputs(packed_mask(DOCUMENTS, SEQ_LEN), cos, sin)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def turned(x: Tensor, position: int) -> Tensor:
    """Rotate one head at a position: pair i is a complex number turned by position / 100^(2i/d)."""
    half = WIDTH // 2
    pairs = torch.arange(half, dtype=torch.float64)
    turn = position * 100.0 ** (-2 * pairs / WIDTH)
    z = torch.complex(x[:half], x[half:]) * torch.exp(1j * turn)
    return torch.cat([z.real, z.imag])


def attention_loop(attention: Attention, x: Tensor) -> Tensor:
    """Define attention on the two packed documents, a head and a query at a time."""
    group = HEADS // attention.kv_heads
    q_width, kv_width = HEADS * WIDTH, attention.kv_heads * WIDTH
    queries, keys, values = [], [], []
    for row, position in zip(
        x[0] @ attention.qkv_proj.weight.t(), POSITIONS[0].tolist(), strict=True
    ):
        q, k, v = row.split([q_width, kv_width, kv_width])
        if attention.qk_norm == "vector":
            q, k = rms_norm(q, attention.q_norm.weight), rms_norm(k, attention.k_norm.weight)
        q_heads, k_heads = q.split(WIDTH), k.split(WIDTH)
        if attention.qk_norm == "head":
            q_heads = [rms_norm(h, attention.q_norm.weight) for h in q_heads]
            k_heads = [rms_norm(h, attention.k_norm.weight) for h in k_heads]
        queries.append([turned(h, position) for h in q_heads])
        keys.append([turned(h, position) for h in k_heads])
        values.append(v.split(WIDTH))
    outputs = []
    for t in range(SEQ_LEN):
        seen = [s for s in range(t + 1) if DOCUMENTS[0, s] == DOCUMENTS[0, t]]
        heads = []
        for head in range(HEADS):
            logits = [queries[t][head] @ keys[s][head // group] / math.sqrt(WIDTH) for s in seen]
            weights = torch.stack(logits).softmax(0)
            heads.append(
                sum(w * values[s][head // group] for w, s in zip(weights, seen, strict=True))
            )
        outputs.append(attention.o_proj.weight @ torch.cat(heads))
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("qk_norm", ["none", "head", "vector"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_equals_the_loop(qk_norm, num_kv_heads) -> None:
    attention, x = build(qk_norm=qk_norm, num_kv_heads=num_kv_heads), tokens()
    expected = attention_loop(attention, x)
    torch.testing.assert_close(attention(x, inputs()), expected, rtol=1e-10, atol=1e-10)


def test_grouped_queries_equal_repeated_heads() -> None:
    grouped, full = build(num_kv_heads=2), build()
    q, k, v = grouped.qkv_proj.weight.split([HEADS * WIDTH, 2 * WIDTH, 2 * WIDTH])
    k, v = (w.view(2, 1, WIDTH, DIM).expand(2, 2, WIDTH, DIM).flatten(0, 2) for w in (k, v))
    full.qkv_proj.weight.data = torch.cat([q, k, v])
    full.o_proj.weight.data = grouped.o_proj.weight.data
    torch.testing.assert_close(full(tokens(), inputs()), grouped(tokens(), inputs()))


def test_packed_mask_by_hand() -> None:
    ids = torch.tensor([[0, 0, 1, -1]])
    mask = packed_mask(ids, 4)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert torch.equal(packed_mask(ids, 3), mask[:, :, 1:]), "the first token is in the cache"


def test_rotary_angles_keep_far_positions_apart_in_bfloat16() -> None:
    """The angles are computed wider than they are returned: position 1001 is not 1000."""
    cosines, _ = rotary_angles(torch.tensor([[1000, 1001]]), 4, 10_000.0, torch.bfloat16)
    exact = torch.tensor([1000.0, 1001.0]).cos()
    assert cosines.dtype == torch.bfloat16
    torch.testing.assert_close(cosines[0, 0, :, 0].float(), exact, rtol=0, atol=0.01)


def test_a_full_cache_takes_no_more() -> None:
    cache = KVCache(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    new = torch.ones(1, 1, 1, 4)
    for length in (1, 2):
        keys, values = cache.append(new, 2 * new)
        assert keys.shape == values.shape == (1, 1, length, 4)
    assert values.unique().tolist() == [2]
    with pytest.raises(AssertionError, match="as long as the longest"):
        cache.append(new, new)
