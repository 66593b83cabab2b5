"""The root of the configuration: all sections, and the checks that span several of them."""

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from dmoe.checkpoint import CheckpointConfig
from dmoe.config.base import ConfigError, ConfigModel
from dmoe.data import DataConfig
from dmoe.engine import EngineConfig
from dmoe.models import ModelConfig, Recompute
from dmoe.optim import OptimConfig
from dmoe.parallel import ParallelConfig


class RunConfig(ConfigModel):
    """Where a run is kept and what its randomness starts from."""

    name: str = "run"
    """Name of the run's folder inside `dir`."""
    dir: Path = Path("runs")
    """Folder of all runs."""
    seed: NonNegativeInt = 0
    """Initial weights, order of data and router noise are functions of it."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
            raise ValueError(f"{name!r} is not the name of one folder; put its parent into run.dir")
        return name

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.dir / self.name


class TrainConfig(ConfigModel):
    """How much is trained, and in what portions."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    global_batch_size: PositiveInt = 32
    """Sequences of an optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 8
    """Sequences of one forward pass on one rank. A global batch falls into the same micro-batches
    on any number of ranks; a rank that has several accumulates their gradients."""
    seq_len: PositiveInt = 256
    """Tokens of a sequence."""
    recompute: Recompute = "none"
    """Activations to compute again in the backward pass instead of keeping them: "selective" those
    of attention, "full" whole layers. Routing is kept in any case."""
    max_skipped_steps: PositiveInt = 10
    """The run ends with an error after this many steps in a row whose loss or gradient is not
    finite; each is skipped."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a global batch."""
        return self.global_batch_size // self.micro_batch_size


class EvalConfig(ConfigModel):
    """Evaluation on the held-out split during and after training."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 for the end only."""
    max_batches: PositiveInt | None = None
    """Micro-batches of an evaluation during training, which also decides which checkpoint is best;
    null for the whole split, which is measured once more at the end in any case."""
    k: tuple[PositiveInt, ...] = ()
    """Experts per token, in every MoE layer, at which an evaluation during training is made, a row
    each; the first one decides which checkpoint is best. Empty for the router's own number alone,
    which the measurement at the end of training takes in any case."""
    prompt: str = Field(default="def ", min_length=1)
    """Start of the sample that is generated at the end of training."""
    sample_tokens: NonNegativeInt = 200
    """Tokens of that sample at most, as `model.max_seq_len` ends it too; 0 for none."""


class MetricsConfig(ConfigModel):
    """What is recorded, and how often."""

    log_every: PositiveInt = 10
    """Steps between rows in `metrics.jsonl`, TensorBoard and the console."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    moe: Literal["brief", "detailed"] = "brief"
    """"detailed" adds the router statistics of every layer to those over all layers."""
    heatmap_every: NonNegativeInt = 100
    """Steps between images of the experts' load by layer; 0 for none."""
    peak_flops: PositiveFloat | None = None
    """Peak of one device in FLOPs a second, for the utilisation; null to look up known GPUs."""


class Config(ConfigModel):
    """A training run."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        train, model, moe = self.train, self.model, self.model.moe
        if train.global_batch_size % train.micro_batch_size:
            raise ConfigError(
                f"train.global_batch_size = {train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size = {train.micro_batch_size}: change either",
                key="train.global_batch_size",
            )
        if train.seq_len > model.max_seq_len:
            raise ConfigError(
                f"train.seq_len = {train.seq_len} is more than model.max_seq_len = "
                f"{model.max_seq_len}: lower the first or raise the second",
                key="train.seq_len",
            )
        if moe is None:
            if self.parallel.ep > 1:
                raise ConfigError(
                    f"parallel.ep = {self.parallel.ep}, but the model has no experts: set "
                    f"parallel.ep to 1, or add model.moe",
                    key="parallel.ep",
                )
            return self
        if moe.num_shards % self.parallel.ep:
            leaf, key = moe.leaf, f"model.moe.{moe.leaf_path}num_experts"
            blocks = " blocks of model.moe.infinite" if leaf.infinite else ""
            given = f"{key} = {leaf.num_shards}{blocks} is"
            if leaf.num_shards != leaf.num_networks:
                given = (
                    f"{key} = {leaf.num_experts} has {leaf.num_shards} "
                    f"{leaf.used_router.shards} to divide over ranks, and {leaf.num_shards} is"
                )
            raise ConfigError(
                f"{given} not a multiple of parallel.ep = {self.parallel.ep}, so the ranks cannot "
                f"hold equally many: change either",
                key=key,
            )
        return self

    @model_validator(mode="after")
    def _model_runs_at_eval_k(self) -> "Config":
        for k in self.eval.k:
            try:
                self.model.k_of_layers(k)
            except ConfigError as error:
                raise ConfigError(str(error), key="eval.k") from None
        return self

    def check_world(self, world_size: int) -> None:
        """Check what depends on the number of ranks.

        Raises:
            ConfigError: the ranks do not divide into ep groups, or the micro-batches over ranks.
        """
        if world_size % self.parallel.ep:
            raise ConfigError(
                f"parallel.ep = {self.parallel.ep} does not divide the number of ranks, "
                f"{world_size}: change parallel.ep, or start another number of processes "
                f"(torchrun --nnodes, --nproc-per-node)"
            )
        train = self.train
        if train.num_micro_batches % world_size:
            raise ConfigError(
                f"train.global_batch_size = {train.global_batch_size} makes "
                f"{train.num_micro_batches} micro-batches of train.micro_batch_size = "
                f"{train.micro_batch_size}, which {world_size} ranks cannot share equally: make "
                f"train.global_batch_size a multiple of {train.micro_batch_size * world_size}"
            )
