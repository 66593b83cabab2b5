import numpy as np
import pytest

from dmoe.config.base import ConfigError
from dmoe.data.blend import BLOCK, Blend, block_shares
from dmoe.data.packing import PackedDataset


@pytest.fixture
def datasets(make_split):
    return [
        PackedDataset(
            make_split([list(range(k, k + 50))], name=f"source{k}"),
            seq_len=4,
            seed=1,
            vocab_size=1000,
        )
        for k in (0, 100, 200)
    ]


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 0.1], [5, 1e-2, 3.3], [1 / 3, 1, 7]])
def test_shares_are_exact(weights):
    shares = block_shares(weights)
    assert shares.sum() == BLOCK
    assert np.abs(shares - np.array(weights) / sum(weights) * BLOCK).max() <= 1


def test_every_block_has_its_shares_and_no_gap(datasets):
    blend = Blend(datasets, [0.7, 0.2, 0.1])
    located = [blend.locate(n) for n in range(3 * BLOCK)]
    for block in range(3):
        chosen = [dataset for dataset, _ in located[block * BLOCK : (block + 1) * BLOCK]]
        assert np.bincount(chosen).tolist() == blend.shares.tolist()
    for dataset in range(3):
        numbers = [number for d, number in located if d == dataset]
        assert numbers == list(range(len(numbers)))
    assert [d for d, _ in located[:BLOCK]] != [d for d, _ in located[BLOCK : 2 * BLOCK]]


def test_pure_function_of_the_number(datasets):
    straight = Blend(datasets, [1, 2, 3])
    expected = [straight.locate(n) for n in range(2 * BLOCK)]
    scattered = Blend(datasets, [1, 2, 3])
    for n in np.random.default_rng(0).permutation(2 * BLOCK)[:200]:
        assert scattered.locate(int(n)) == expected[n]


def test_samples_come_from_the_located_source(datasets):
    blend = Blend(datasets, [1, 2, 3])
    for n in range(50):
        dataset, number = blend.locate(n)
        assert (blend[n].tokens == datasets[dataset][number].tokens).all()
        assert (blend[n].tokens // 100 == dataset).all()


def test_weight_too_small_for_a_block(datasets):
    message = r"data\.sources: weight 0\.0001 of source100 is too small beside the sum 2\.0001"
    with pytest.raises(ConfigError, match=message):
        Blend(datasets, [1, 0.0001, 1])
