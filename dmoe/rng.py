"""Named counter-based random streams: value = f(seed, stream, counters).

Nothing is drawn from a global generator, so a value does not depend on what was drawn before it,
on the rank that draws it, or on whether it is drawn a second time under recomputation or after a
resume. Streams in use: "init", "data", "blend", "k" (elastic), "co_activation",
"second_choice", "router_jitter", "router_noise", "expert_dropout", "infinite" and "infinite_choice"
(samples of a continuous space), "sample" (generation).
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def stream_key(seed: int, stream: str, *counters: int | str) -> int:
    """Return the 128-bit key of one point of a stream."""
    text = "/".join((str(seed), stream, *map(str, counters)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def numpy_generator(seed: int, stream: str, *counters: int | str) -> np.random.Generator:
    """Return a NumPy generator for host-side draws (data order, elastic k)."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, stream, *counters)))


def torch_generator(seed: int, stream: str, *counters: int | str) -> torch.Generator:
    """Return a CPU generator; tensors drawn from it are moved to their device, so devices agree."""
    return torch.Generator().manual_seed(stream_key(seed, stream, *counters) & (_MASK64 >> 1))


def token_uniform(key: int, token_ids: Tensor, num: int) -> Tensor:
    """Draw uniform numbers for each token from the token's global id alone.

    The splitmix64 finaliser is applied to a Weyl sequence over (token, column): elementwise integer
    arithmetic that gives the same bits on every device, rank and slice of the batch.

    Args:
        key: a `stream_key`.
        token_ids: (T,) int64 ids, unique in the stream's step.
        num: numbers per token.

    Returns:
        (T, num) float32 in [0, 1).
    """
    column = torch.arange(num, device=token_ids.device)
    counter = token_ids[:, None] * num + column
    z = _wrap(key) + counter * _wrap(0x9E3779B97F4A7C15)
    z = _mix(z ^ _wrap(key >> 64))
    return _shift(z, 40).to(torch.float32) * 2.0**-24


def token_normal(key: int, token_ids: Tensor, num: int) -> Tensor:
    """Draw standard normal numbers for each token from the token's global id alone.

    Two numbers come from two uniform ones by Box and Muller (1958). Logarithm and cosine may differ
    between devices in the last bit of float64; rounded to float32, hardly one result in 10^8 does.

    Args:
        key: a `stream_key`.
        token_ids: (T,) int64 ids, unique in the stream's step.
        num: numbers per token.

    Returns:
        (T, num) float32, below 5.8 in magnitude.
    """
    half = -(-num // 2)
    uniform = token_uniform(key, token_ids, 2 * half).double()
    radius = (-2 * torch.log1p(-uniform[:, :half])).sqrt()
    angle = 2 * math.pi * uniform[:, half:]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return normal[:, :num].float()


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrap(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right without the sign: int64 is the only 64-bit integer torch computes with."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value
