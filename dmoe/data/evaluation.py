"""Reads a whole held-out split once, in the order of its file.

Called by the trainer and `dmoe eval`.
"""

from collections.abc import Iterator
from functools import partial

from dmoe.data.batch import MicroBatch, collate, padding_sample
from dmoe.data.packing import cut_window, file_layout
from dmoe.data.store import TokenSplit


def eval_batches(
    split: TokenSplit,
    *,
    seq_len: int,
    micro_batch_size: int,
    vocab_size: int,
    mask_documents: bool = True,
    rank: int = 0,
    world: int = 1,
    max_batches: int | None = None,
) -> Iterator[MicroBatch]:
    """Yield one rank's share of the micro-batches of a split.

    Micro-batch b holds the windows [b*M, (b+1)*M), however many ranks there are; rank r takes
    b = r, r + world, ... Every rank yields equally many, because ranks meet in collectives: the
    last window, the last micro-batch and the last round are filled with padding.

    Args:
        split: what to read.
        seq_len: S, tokens in a window.
        micro_batch_size: M, windows in a micro-batch.
        vocab_size: of the model.
        mask_documents: as in training.
        rank: of this process among those that read data.
        world: number of such processes.
        max_batches: stop after so many micro-batches, over all ranks.

    Raises:
        ConfigError: naming file and offset of an id beyond the vocabulary.
    """
    cut = partial(
        cut_window,
        split,
        file_layout(split),
        seq_len=seq_len,
        vocab_size=vocab_size,
        mask_documents=mask_documents,
    )
    num_windows = -(-(split.num_tokens - 1) // seq_len)
    num_batches = -(-num_windows // micro_batch_size)
    if max_batches is not None and max_batches < num_batches:
        num_batches = max_batches
        num_windows = max_batches * micro_batch_size
    padding = padding_sample(seq_len)
    num_rounds = -(-num_batches // world)
    for b in range(rank, num_rounds * world, world):
        first = b * micro_batch_size
        windows = [w if w < num_windows else -1 for w in range(first, first + micro_batch_size)]
        yield collate(b, windows, [padding if w < 0 else cut(w) for w in windows])
