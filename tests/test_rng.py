import torch

from dmoe.rng import numpy_generator, stream_key, token_uniform, torch_generator


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
