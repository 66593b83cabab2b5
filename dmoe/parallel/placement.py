"""Which dimension of an expert weight is shared out among the ranks that hold the same experts."""

from collections.abc import Sequence


def expert_shard_dim(shape: Sequence[int], num_ranks: int) -> int:
    """Return 0 to share out whole experts, or 1 to cut each one where those do not come out even.

    Few experts on many ranks would otherwise leave some ranks without any share.

    Args:
        shape: (e, rows, columns) of the weights of e local experts.
        num_ranks: ranks that hold the same experts.
    """
    return 1 if shape[0] % num_ranks and not shape[1] % num_ranks else 0
