"""Builds what a `data` section describes: opens and checks the stores.

Called by the trainer and `dmoe eval`.
"""

from pathlib import Path

from dmoe.config.base import ConfigError
from dmoe.data.blend import Blend
from dmoe.data.config import DataConfig
from dmoe.data.corpora import BUILTIN_STDLIB
from dmoe.data.manifest import SplitName
from dmoe.data.packing import Dataset, PackedDataset
from dmoe.data.preparation import builtin_store
from dmoe.data.store import TokenSplit, open_store, verify_store
from dmoe.data.tokenizer import load_tokenizer


def build_train_dataset(
    config: DataConfig,
    *,
    seq_len: int,
    vocab_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> Dataset:
    """Open the training sources and blend them.

    Args:
        config: the `data` section.
        seq_len: tokens in a sample.
        vocab_size: of the model.
        seed: of the order of samples.
        rank: of this process among those that share the check of the bytes, on one disk.
        world: number of such processes.

    Raises:
        ConfigError: for a store that is missing, damaged (only on the process that found it), or
            made with another tokenizer.
    """
    datasets = []
    for source in config.sources:
        split = _open_split(source.path, "train", config, vocab_size, rank, world)
        datasets.append(
            PackedDataset(
                split,
                seq_len=seq_len,
                seed=seed,
                vocab_size=vocab_size,
                mask_documents=config.mask_documents,
            )
        )
    if len(datasets) == 1:
        return datasets[0]
    return Blend(datasets, [source.weight for source in config.sources])


def build_valid_split(
    config: DataConfig, *, vocab_size: int, rank: int = 0, world: int = 1
) -> TokenSplit:
    """Open the held-out split; arguments and errors are those of `build_train_dataset`."""
    if config.valid is None and len(config.sources) > 1:
        raise ConfigError(
            f"data.sources has {len(config.sources)} entries: set data.valid to say which store is "
            "evaluated"
        )
    path = config.valid or config.sources[0].path
    return _open_split(path, "valid", config, vocab_size, rank, world)


def _open_split(
    path: str, name: SplitName, config: DataConfig, vocab_size: int, rank: int, world: int
) -> TokenSplit:
    folder = (
        builtin_store(config.cache_dir, config.tokenizer) if path == BUILTIN_STDLIB else Path(path)
    )
    store = open_store(folder, source=path)
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size {vocab_size} is less than the {tokenizer.vocab_size} ids of "
            f"data.tokenizer {config.tokenizer}"
        )
    if store.manifest is None:
        # A bare prefix is one text, held out where data.valid says so.
        return store.split("train" if path == config.valid else name)
    made_with = store.manifest.tokenizer
    if made_with.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"data source {path} was made with tokenizer {made_with.spec} (vocabulary "
            f"{made_with.vocab_size}, fingerprint {made_with.fingerprint[:12]}), but "
            f"data.tokenizer is {config.tokenizer} (vocabulary {tokenizer.vocab_size}, fingerprint "
            f"{tokenizer.fingerprint[:12]})"
        )
    split = store.split(name)
    if config.verify == "full":
        verify_store(folder, splits=[name], rank=rank, world=world)
    return split
