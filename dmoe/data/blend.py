"""Blends datasets by weight: which of them sample `n` comes from is a pure function of `n`."""

from collections.abc import Sequence

import numpy as np

from dmoe.config.base import ConfigError
from dmoe.data.packing import PackedDataset, Sample, SourceRecord
from dmoe.rng import numpy_generator

BLOCK = 4096
"""Samples after which every dataset has had its share exactly."""


class Blend:
    """Several datasets as one; each is read in its own order, without a gap.

    Every block of `BLOCK` samples holds the same count of each dataset, the weights rounded so that
    the counts sum up; the order within the block is shuffled.

    Args:
        datasets: two or more, of one seq_len and seed (a single dataset is its own blend).
        weights: one positive number each, relative to their sum.

    Raises:
        ConfigError: if a weight is too small to have a sample in a block.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float]):
        assert len(datasets) == len(weights) > 1
        self.datasets = tuple(datasets)
        self.seq_len = datasets[0].seq_len
        self.seed = datasets[0].seed
        self.shares = block_shares(weights)
        for dataset, weight in zip(datasets, weights, strict=True):
            if weight * BLOCK < sum(weights):
                raise ConfigError(
                    f"data.sources: weight {weight} of {dataset.split.source} is too small beside "
                    f"the sum {sum(weights):g} for one sample in {BLOCK}: raise it, or leave it out"
                )
        self._block = self._shuffle(0)

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """Every dataset's source and share."""
        return tuple(
            SourceRecord(
                path=dataset.split.source, fingerprint=dataset.split.fingerprint, share=int(share)
            )
            for dataset, share in zip(self.datasets, self.shares, strict=True)
        )

    def locate(self, n: int) -> tuple[int, int]:
        """Return the dataset that sample `n` comes from, and the number of the sample there."""
        number, i = divmod(n, BLOCK)
        block = self._block
        if block[0] != number:
            block = self._block = self._shuffle(number)
        _, datasets, ranks = block
        dataset = int(datasets[i])
        return dataset, number * int(self.shares[dataset]) + int(ranks[i])

    def __getitem__(self, n: int) -> Sample:
        """Return sample `n` of the blend."""
        dataset, number = self.locate(n)
        return self.datasets[dataset][number]

    def _shuffle(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the block, each sample's dataset, and its rank in that dataset's share."""
        datasets = np.repeat(np.arange(len(self.shares)), self.shares)
        numpy_generator(self.seed, "blend", block).shuffle(datasets)
        ranks = np.empty(BLOCK, np.int64)
        for dataset, share in enumerate(self.shares):
            ranks[datasets == dataset] = np.arange(share)
        return block, datasets, ranks


def block_shares(weights: Sequence[float]) -> np.ndarray:
    """Return how many samples of a block each dataset has; they sum to `BLOCK` exactly."""
    edges = np.cumsum([0.0, *weights]) / sum(weights) * BLOCK
    # Half up, not half to even: so a weight that is worth a sample has one.
    edges = np.floor(edges + 0.5).astype(np.int64)
    edges[-1] = BLOCK
    return np.diff(edges)
