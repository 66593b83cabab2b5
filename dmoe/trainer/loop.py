"""The training loop, and the moments at which callbacks see it."""

from collections.abc import Sequence

from dmoe.checkpoint import CheckpointManager
from dmoe.config import config_tree
from dmoe.data import TrainLoader
from dmoe.engine import Engine
from dmoe.metrics import Throughput
from dmoe.trainer.config import Config
from dmoe.trainer.progress import Progress
from dmoe.trainer.step import StepRecord, train_step


class Callback:
    """Optional behaviour of a run: a subclass overrides the moments that it needs."""

    def on_start(self, trainer: "Trainer") -> None:
        """Be called before the first step; progress tells whether the run is resumed."""

    def on_step(self, trainer: "Trainer", record: StepRecord) -> None:
        """Be called after every step."""

    def on_end(self, trainer: "Trainer") -> None:
        """Be called after the last step."""


class Trainer:
    """Runs the steps of a run from where its progress stands."""

    def __init__(
        self,
        config: Config,
        *,
        engine: Engine,
        loader: TrainLoader,
        checkpoints: CheckpointManager,
        progress: Progress,
    ):
        self.config, self.engine, self.loader = config, engine, loader
        self.checkpoints, self.progress = checkpoints, progress
        self.throughput = Throughput()

    def fit(self, callbacks: Sequence[Callback] = ()) -> None:
        """Train to the last step; callbacks come in their order, after every step."""
        for callback in callbacks:
            callback.on_start(self)
        while not self.done:
            with self.throughput.waiting_for_data():
                batches = self.loader.next_step()
            record = train_step(self.config, self.engine, batches, self.progress)
            self.throughput.add(record.result.num_tokens)
            for callback in callbacks:
                callback.on_step(self, record)
        for callback in callbacks:
            callback.on_end(self)

    @property
    def done(self) -> bool:
        """Whether the last step has been made."""
        return self.progress.step >= self.config.train.steps

    def due(self, every: int) -> bool:
        """Say whether something that happens every n steps happens now; 0 is only at the end."""
        return self.done or bool(every and self.progress.step % every == 0)

    def save(self) -> None:
        """Save a checkpoint of this moment; the last one is waited for."""
        parts = {
            "config": config_tree(self.config),
            "optimizer": self.engine.scalars(),
            "schedule": {"optimizer_steps": self.progress.optimizer_steps},
            "data": self.loader.state().model_dump(mode="json"),
            "rng": {"seed": self.config.run.seed},
            "progress": self.progress.state(),
        }
        self.checkpoints.save(
            self.progress.step,
            self.engine.state(),
            parts,
            config_tree(self.config),
            eval_loss=self.progress.eval_loss,
            block=self.done,
        )
