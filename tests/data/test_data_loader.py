import threading

import numpy as np
import pytest

from dmoe.config.base import ConfigError
from dmoe.data.blend import Blend
from dmoe.data.loader import LoaderState, TrainLoader, check_resume
from dmoe.data.packing import PackedDataset

SIZES = {"global_batch_size": 8, "micro_batch_size": 2}


@pytest.fixture
def dataset(numbered_split):
    return PackedDataset(numbered_split, seq_len=8, seed=3, vocab_size=1000)


def steps(dataset, count, **options):
    """Return the micro-batches of all steps of one rank."""
    with TrainLoader(dataset, **{**SIZES, **options}) as loader:
        return [loader.next_step() for _ in range(count)]


def test_samples_of_a_step(dataset):
    for t, batches in enumerate(steps(dataset, 12)):
        assert [batch.index for batch in batches] == [0, 1, 2, 3]
        numbers = [int(n) for batch in batches for n in batch.sample_ids_B]
        assert numbers == list(range(8 * t, 8 * t + 8))
        for batch in batches:
            for row, n in enumerate(batch.sample_ids_B.tolist()):
                assert batch.tokens_BS[row].tolist() == dataset[n].tokens.tolist()
                assert batch.labels_BS[row].tolist() == dataset[n].labels.tolist()
                assert batch.positions_BS[row].tolist() == dataset[n].positions.tolist()
                assert batch.document_ids_BS[row].tolist() == dataset[n].document_ids.tolist()
            assert batch.num_targets == int(np.sum(batch.labels_BS.numpy() != -100))
            assert bool(batch.valid_BS.all())


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 11])
def test_ranks_and_resume_keep_the_order(dataset, world, first_step):
    """The ranks of a resumed run together are the straight run: mid-epoch and over its edge."""
    assert 4 * 8 < dataset.num_windows < 6 * 8
    straight = steps(dataset, 12)[first_step:]
    ranks = [
        steps(dataset, 12 - first_step, rank=r, world=world, start_sample=8 * first_step)
        for r in range(world)
    ]
    for t, expected in enumerate(straight):
        union = {batch.index: batch for rank in ranks for batch in rank[t]}
        assert sum(len(rank[t]) for rank in ranks) == len(expected)
        for batch in expected:
            assert union[batch.index].tokens_BS.equal(batch.tokens_BS)
            assert union[batch.index].sample_ids_B.equal(batch.sample_ids_B)


def test_state_is_behind_the_returned_step(dataset):
    with TrainLoader(dataset, **SIZES) as loader:
        assert loader.state().samples_consumed == 0
        loader.next_step()
        loader.next_step()
        state = loader.state()
        expected = loader.next_step()
    state = LoaderState.model_validate_json(state.model_dump_json())
    assert state.samples_consumed == 16
    check_resume(state, dataset)
    (resumed,) = steps(dataset, 1, start_sample=state.samples_consumed)
    assert [b.sample_ids_B.tolist() for b in resumed] == [b.sample_ids_B.tolist() for b in expected]


def test_resume_says_what_changed(make_split):
    def state_of(**changes):
        options = {"seed": 3, "seq_len": 8, "name": "a", "weights": [1, 1], **changes}
        datasets = [
            PackedDataset(
                make_split([list(range(50))], name=name),
                seq_len=options["seq_len"],
                seed=options["seed"],
                vocab_size=100,
            )
            for name in (options["name"], "b")
        ]
        return Blend(datasets, options["weights"])

    with TrainLoader(state_of(), **SIZES) as loader:
        state = loader.state()
    check_resume(state, state_of())
    for changes, message in [
        ({"seed": 4}, r"run\.seed was 3 .* now 4"),
        ({"seq_len": 4}, r"train\.seq_len was 8 .* now 4"),
        ({"name": "c"}, r"data source c is not the data .*\(a\): its fingerprint was fingerprint"),
        ({"weights": [3, 1]}, r"weight of data source a changed: .* was 2048 and is now 3072"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_resume(state, state_of(**changes))
    with pytest.raises(ConfigError, match=r"data\.sources had 2 entries .* has 1 now"):
        check_resume(state, state_of().datasets[0])


def test_a_source_may_move(dataset):
    with TrainLoader(dataset, **SIZES) as loader:
        state = loader.state()
    moved = state.sources[0].model_copy(update={"path": "/elsewhere"})
    check_resume(state.model_copy(update={"sources": (moved,)}), dataset)


def test_uneven_batches(dataset):
    message = r"train\.global_batch_size 8 is not a multiple of train\.micro_batch_size 2 x 3 ranks"
    with pytest.raises(ConfigError, match=message):
        TrainLoader(dataset, **SIZES, world=3)


class BrokenDataset:
    """Fails at one sample."""

    seq_len, seed, sources = 8, 0, ()

    def __init__(self, dataset, bad):
        self._dataset, self._bad = dataset, bad

    def __getitem__(self, n):
        if n == self._bad:
            raise ConfigError(f"sample {n} is damaged")
        return self._dataset[n]


def test_errors_of_the_thread_reach_the_consumer(dataset):
    with TrainLoader(BrokenDataset(dataset, bad=9), **SIZES) as loader:
        loader.next_step()
        for _ in range(2):
            with pytest.raises(ConfigError, match="sample 9 is damaged"):
                loader.next_step()
        assert loader.state().samples_consumed == 8


def test_reads_one_step_ahead_and_ends_its_thread(dataset):
    read = []

    class Watched(BrokenDataset):
        def __getitem__(self, n):
            read.append(n)
            return super().__getitem__(n)

    before = threading.active_count()
    loader = TrainLoader(Watched(dataset, bad=-1), **SIZES)
    loader.next_step()
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
    assert read == list(range(16)) or read == list(range(8))


def test_to_device(dataset):
    (batches,) = steps(dataset, 1)
    moved = batches[1].to("meta")
    assert moved.index == 1
    assert moved.tokens_BS.device.type == "meta"
    assert moved.sample_ids_B.device.type == "cpu"
