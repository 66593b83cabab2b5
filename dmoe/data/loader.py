"""Reads training batches in the run's one global order, and resumes it at any sample.

Optimizer step t takes samples [t*G, (t+1)*G) of the dataset, G = global batch size, and its
micro-batch j takes [t*G + j*M, t*G + (j+1)*M), M = micro-batch size, however many ranks there are:
rank r of `world` takes the micro-batches j = r, r + world, ... Called by the trainer.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.data.batch import MicroBatch, collate
from dmoe.data.packing import Dataset, SourceRecord


class LoaderState(ConfigModel):
    """The data part of a checkpoint: all that decides which samples come next."""

    samples_consumed: int
    """Global samples of all finished steps."""
    seed: int
    """Of the order."""
    seq_len: int
    """Tokens in a sample."""
    sources: tuple[SourceRecord, ...]
    """What was read, in the order of `data.sources`."""


class TrainLoader:
    """Gives the micro-batches of one rank, step by step, while a thread reads the next step.

    Use as a context manager, or call `close`, to end the thread.

    Args:
        dataset: where the samples come from.
        global_batch_size: G, samples an optimizer step.
        micro_batch_size: M, samples of one forward pass.
        rank: of this process among those that read data.
        world: number of such processes.
        start_sample: `LoaderState.samples_consumed` of a resumed run.

    Raises:
        ConfigError: if the micro-batches of a step do not come out even over the ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world: int = 1,
        start_sample: int = 0,
    ):
        if global_batch_size % (micro_batch_size * world):
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                f"train.micro_batch_size {micro_batch_size} x {world} ranks = "
                f"{micro_batch_size * world}"
            )
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world = world
        self._samples_consumed = start_sample
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next = self._read_ahead()

    def next_step(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next step.

        Raises:
            ConfigError: whatever reading them raised in the thread.
        """
        batches = self._next.result()
        self._samples_consumed += self._global_batch_size
        self._next = self._read_ahead()
        return batches

    def state(self) -> LoaderState:
        """Return where the run is: behind the last step that `next_step` returned."""
        return LoaderState(
            samples_consumed=self._samples_consumed,
            seed=self._dataset.seed,
            seq_len=self._dataset.seq_len,
            sources=self._dataset.sources,
        )

    def close(self) -> None:
        """End the thread; what it has read ahead is dropped."""
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_ahead(self) -> Future[list[MicroBatch]]:
        return self._reader.submit(
            step_batches,
            self._dataset,
            self._samples_consumed,
            global_batch_size=self._global_batch_size,
            micro_batch_size=self._micro_batch_size,
            rank=self._rank,
            world=self._world,
        )


def step_batches(
    dataset: Dataset,
    first_sample: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world: int,
) -> list[MicroBatch]:
    """Return one rank's micro-batches of the step that starts at a sample."""
    batches = []
    for j in range(rank, global_batch_size // micro_batch_size, world):
        start = first_sample + j * micro_batch_size
        numbers = range(start, start + micro_batch_size)
        batches.append(collate(j, numbers, [dataset[n] for n in numbers]))
    return batches


def check_resume(state: LoaderState, dataset: Dataset) -> None:
    """Check that a dataset continues the order a checkpoint was in.

    Raises:
        ConfigError: naming what changed; a source that only moved to another path has not.
    """
    for key, name in (("seed", "run.seed"), ("seq_len", "train.seq_len")):
        was, now = getattr(state, key), getattr(dataset, key)
        if was != now:
            raise ConfigError(f"{name} was {was} when the checkpoint was saved and is now {now}")
    if len(state.sources) != len(dataset.sources):
        raise ConfigError(
            f"data.sources had {len(state.sources)} entries when the checkpoint was saved and has "
            f"{len(dataset.sources)} now"
        )
    for was, now in zip(state.sources, dataset.sources, strict=True):
        if was.fingerprint != now.fingerprint:
            raise ConfigError(
                f"data source {now.path} is not the data that the checkpoint was trained on "
                f"({was.path}): its fingerprint was {was.fingerprint} and is now {now.fingerprint}"
            )
        if was.share != now.share:
            raise ConfigError(
                f"the weight of data source {now.path} changed: its share of a block of samples "
                f"was {was.share} and is now {now.share}"
            )
