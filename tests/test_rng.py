import pytest
import torch

from dmoe import rng
from dmoe.rng import (
    numpy_generator,
    stream_key,
    token_normal,
    token_uniform,
    torch_generator,
)


def test_streams_are_functions_of_their_counters() -> None:
    assert stream_key(1, "k", 2) == stream_key(1, "k", 2)
    keys = {
        stream_key(1, "k", 2),
        stream_key(1, "k", 3),
        stream_key(2, "k", 2),
        stream_key(1, "j", 2),
    }
    assert len(keys) == 4
    assert numpy_generator(1, "k", 2).random() == numpy_generator(1, "k", 2).random()
    first = torch.rand(3, generator=torch_generator(7, "init", 0))
    assert torch.equal(first, torch.rand(3, generator=torch_generator(7, "init", 0)))


def test_token_numbers_depend_on_the_token_alone() -> None:
    key = stream_key(0, "router_jitter", 5)
    ids = torch.arange(1000)
    whole = token_uniform(key, ids, 4)
    shuffled = torch.randperm(1000)
    assert torch.equal(token_uniform(key, ids[shuffled], 4), whole[shuffled])
    assert torch.equal(token_uniform(key, ids[500:], 4), whole[500:])


def test_token_numbers_are_uniform() -> None:
    u = token_uniform(stream_key(3, "router_jitter", 1), torch.arange(100_000), 3).double()
    assert u.min() >= 0
    assert u.max() < 1
    torch.testing.assert_close(u.mean(0), torch.full((3,), 0.5).double(), atol=5e-3, rtol=0)
    torch.testing.assert_close(u.var(0), torch.full((3,), 1 / 12).double(), atol=1e-3, rtol=0)
    correlation = torch.corrcoef(u.T) - torch.eye(3)
    assert correlation.abs().max() < 0.02


def test_token_numbers_are_normal() -> None:
    key, ids = stream_key(3, "infinite", 1), torch.arange(100_000)
    x = token_normal(key, ids, 3)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert torch.equal(token_normal(key, ids[500:], 3), x[500:])
    wide = x.double()
    moments = [(wide**power).mean(0) for power in (1, 2, 3, 4)]
    for got, want, tolerance in zip(moments, (0, 1, 0, 3), (0.02, 0.02, 0.05, 0.1), strict=True):
        torch.testing.assert_close(got, torch.full_like(got, want), atol=tolerance, rtol=0)
    correlation = torch.corrcoef(wide.T) - torch.eye(3)
    assert correlation.abs().max() < 0.02
    below = (wide < torch.tensor([-1.0, 0.0, 1.0])).double().mean(0)
    torch.testing.assert_close(
        below, torch.tensor([0.1587, 0.5, 0.8413]).double(), atol=5e-3, rtol=0
    )


@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-24])
def test_the_most_extreme_uniform_number_has_a_normal_one(extreme, monkeypatch) -> None:
    monkeypatch.setattr(rng, "token_uniform", lambda _, ids, n: torch.full((len(ids), n), extreme))
    assert token_normal(0, torch.arange(2), 3).abs().max() < 5.8
