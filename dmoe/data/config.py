"""The `data` section of the configuration."""

from typing import Literal

from pydantic import Field

from dmoe.config.base import ConfigModel
from dmoe.data.corpora import BUILTIN_STDLIB


class SourceConfig(ConfigModel):
    """One store to train on and its share of the samples."""

    path: str
    """Store folder, Megatron `.bin/.idx` prefix, or `builtin:stdlib`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources."""


class DataConfig(ConfigModel):
    """What the model reads."""

    sources: tuple[SourceConfig, ...] = Field(
        default=(SourceConfig(path=BUILTIN_STDLIB),), min_length=1
    )
    """The stores to train on; their `train` splits are blended by weight."""
    valid: str | None = None
    """Where held-out text is: the `valid` split of this store, or all of a Megatron prefix. Without
    it, the `valid` split of the one source."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a `tokenizer.json`; must be the one the stores were made with."""
    mask_documents: bool = True
    """Whether a document is read alone: attention does not cross into its neighbours in the window,
    positions start again, and its first token is not predicted."""
    verify: Literal["full", "size"] = "full"
    """Check before training: `full` compares every byte with its SHA-256 (shared over the ranks),
    `size` only the sizes. A bare Megatron prefix has no hashes."""
    cache_dir: str | None = None
    """Where `builtin:` corpora are kept; by default `dmoe` in `$XDG_CACHE_HOME` or `~/.cache`."""
