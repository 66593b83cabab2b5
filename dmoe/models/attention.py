"""Causal self-attention with rotary or learned positions, grouped queries and a KV cache.

Shapes in comments: B batch, S sequence, H query heads, G key and value heads, d width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.models.config import ModelConfig
from dmoe.models.norm import RMSNorm
from dmoe.ops import Linear, rotate


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, for one layer, in buffers of fixed length."""

    keys: Tensor
    """(B, G, max length, d)."""
    values: Tensor
    """(B, G, max length, d)."""
    length: int = 0
    """Tokens stored."""

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """Return an empty cache for `batch_size` sequences of at most `max_len` tokens."""
        shape = (batch_size, config.kv_heads, max_len, config.width_of_head)
        return cls(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, S, d) new keys and values and return all of them."""
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[2], "the cache is as long as the longest sequence"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention of every layer shares; computed once a forward pass."""

    mask: Tensor | None
    """(B, 1, S, total) bool, True where a query may look; None for plain causal attention."""
    cos: Tensor | None
    """(B, 1, S, d), what `rotary_angles` returns; None with learned positions."""
    sin: Tensor | None
    """As `cos`."""


class Attention(nn.Module):
    """Queries, keys and values in one matrix, `scaled_dot_product_attention`, and a map back."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.width_of_head
        bias = config.family == "gpt2"
        width = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.dim, width, bias=bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.dim, bias=bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            q_width = self.head_dim * (1 if per_head else self.num_heads)
            k_width = self.head_dim * (1 if per_head else self.kv_heads)
            self.q_norm = RMSNorm(q_width, config.norm_eps)
            self.k_norm = RMSNorm(k_width, config.norm_eps)

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        """Attend within (B, S, D), and to what the cache holds before it."""
        q, k, v = self._project(x)
        if inputs.cos is not None and inputs.sin is not None:
            q, k = rotate(q, inputs.cos, inputs.sin), rotate(k, inputs.cos, inputs.sin)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.kv_heads != self.num_heads:
            repeats = self.num_heads // self.kv_heads
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=inputs.mask, is_causal=inputs.mask is None
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, H, S, d), and k and v (B, G, S, d)."""
        batch, seq_len, _ = x.shape
        kv_width = self.kv_heads * self.head_dim
        q, k, v = self.qkv_proj(x).split(
            [self.num_heads * self.head_dim, kv_width, kv_width], dim=-1
        )
        if self.qk_norm == "vector":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, seq_len, self.num_heads, self.head_dim)
        k = k.view(batch, seq_len, self.kv_heads, self.head_dim)
        v = v.view(batch, seq_len, self.kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def packed_mask(document_ids: Tensor, seq_len: int) -> Tensor:
    """Return (B, 1, S, total): causal, and within one document; padding looks at padding.

    Args:
        document_ids: (B, total) number of the document of each token.
        seq_len: S, the tokens at the end that look; those before them are in the cache.
    """
    total = document_ids.shape[1]
    same = document_ids[:, total - seq_len :, None] == document_ids[:, None, :]
    full = torch.ones(seq_len, total, dtype=torch.bool, device=document_ids.device)
    return (same & full.tril(total - seq_len))[:, None]
