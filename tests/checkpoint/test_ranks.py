import pytest

from dmoe.checkpoint.ranks import ALONE, CheckpointError, Ranks
from dmoe.testing import run_distributed


def _raise(error):
    raise error


def test_alone():
    assert ALONE.is_leader
    assert (ALONE.rank, ALONE.size) == (0, 1)
    assert ALONE.run("adding", lambda: 1 + 1) == 2
    assert ALONE.share("adding", lambda: [1]) == [1]
    with pytest.raises(CheckpointError, match=r"^adding failed on rank 0: OSError: no disk$"):
        ALONE.run("adding", lambda: _raise(OSError("no disk")))


def _on_two_ranks():
    import torch.distributed as dist

    ranks = Ranks(dist.group.WORLD)
    messages = []
    for what, action in [
        ("writing", lambda: _raise(OSError("no disk ö")) if ranks.rank == 1 else None),
        ("reading", lambda: _raise(ValueError(f"rank {ranks.rank}"))),
    ]:
        with pytest.raises(CheckpointError) as caught:
            ranks.run(what, action)
        messages.append(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        ranks.share("listing", lambda: _raise(CheckpointError("of a known kind")))
    messages.append(str(caught.value))
    return messages, ranks.share("naming", lambda: {"rank": ranks.rank, "text": "ö"})


def test_a_failure_on_one_rank_is_raised_on_all():
    for messages, shared in run_distributed(_on_two_ranks, 2):
        assert messages == [
            "writing failed on rank 1: OSError: no disk ö",
            "reading failed on rank 0: ValueError: rank 0",
            "listing failed on rank 0: of a known kind",
        ]
        assert shared == {"rank": 0, "text": "ö"}
