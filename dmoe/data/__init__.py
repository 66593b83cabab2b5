"""Text to training batches: prepare a token store, open it, pack, blend, load, and resume.

`prepare` writes stores; `build_train_dataset` and `build_valid_split` open what a `DataConfig`
names; `TrainLoader` and `eval_batches` read them.
"""

from dmoe.data.batch import MicroBatch
from dmoe.data.bigram import BigramResult, bigram_baseline
from dmoe.data.build import build_train_dataset, build_valid_split
from dmoe.data.config import DataConfig, SourceConfig
from dmoe.data.evaluation import eval_batches
from dmoe.data.loader import LoaderState, TrainLoader, check_resume
from dmoe.data.packing import Dataset, PackedDataset
from dmoe.data.preparation import builtin_store, prepare
from dmoe.data.store import TokenSplit, TokenStore, open_store, verify_store
from dmoe.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BigramResult",
    "DataConfig",
    "Dataset",
    "LoaderState",
    "MicroBatch",
    "PackedDataset",
    "SourceConfig",
    "TokenSplit",
    "TokenStore",
    "Tokenizer",
    "TrainLoader",
    "bigram_baseline",
    "build_train_dataset",
    "build_valid_split",
    "builtin_store",
    "check_resume",
    "eval_batches",
    "load_tokenizer",
    "open_store",
    "prepare",
    "verify_store",
]
