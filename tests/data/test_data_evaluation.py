import pytest

from dmoe.data.evaluation import eval_batches

SIZES = {"seq_len": 8, "micro_batch_size": 4, "vocab_size": 1000}


def test_every_token_is_predicted_once(numbered_split):
    """Token p of the file is p, so the labels are all but those that open a document."""
    labels = []
    for batch in eval_batches(numbered_split, **SIZES):
        labels += batch.labels_BS[batch.labels_BS >= 0].tolist()
        assert not bool(batch.labels_BS[~batch.valid_BS].ne(-100).any())
    firsts = set(numbered_split.document_starts.tolist())
    assert labels == [n for n in range(numbered_split.num_tokens) if n not in firsts]


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("max_batches", [None, 3, 1000])
@pytest.mark.parametrize("world", [2, 3, 4, 64])
def test_ranks_share_the_same_windows(numbered_split, world, max_batches, mask_documents):
    options = {**SIZES, "max_batches": max_batches, "mask_documents": mask_documents}
    straight = {b.index: b for b in eval_batches(numbered_split, **options)}
    assert max_batches is None or len(straight) <= max_batches
    ranks = [
        list(eval_batches(numbered_split, **options, rank=r, world=world)) for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    union = {batch.index: batch for batches in ranks for batch in batches}
    for index, batch in union.items():
        if index in straight:
            assert batch.tokens_BS.equal(straight[index].tokens_BS)
            assert batch.sample_ids_B.equal(straight[index].sample_ids_B)
        else:
            assert batch.num_targets == 0
            assert not bool(batch.valid_BS.any())
            assert batch.sample_ids_B.tolist() == [-1] * 4
    assert sum(b.num_targets for b in union.values()) == sum(
        b.num_targets for b in straight.values()
    )


def test_split_shorter_than_a_window(make_split):
    (batch,) = eval_batches(make_split([[1, 2, 3]]), **SIZES)
    assert batch.tokens_BS[0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert batch.labels_BS[0].tolist() == [2, 3, *[-100] * 6]
    assert batch.document_ids_BS[0].tolist() == [0, 0, *[-1] * 6]
    assert batch.sample_ids_B.tolist() == [0, -1, -1, -1]
    assert batch.num_targets == 2
