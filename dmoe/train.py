"""Train a model: `torchrun --nproc-per-node N -m dmoe.train CONFIG [a.b=c ...]`.

In one process: `python -m dmoe.train CONFIG` or `dmoe train CONFIG`. The same command continues an
interrupted run. Exit status: 0 good, 1 failed, 2 bad input, 130 interrupted.
"""

import sys
from collections.abc import Callable, Sequence

from dmoe.checkpoint import CheckpointError
from dmoe.config import ConfigError, load_config
from dmoe.parallel import is_first_process, process_group
from dmoe.trainer.build import open_run
from dmoe.trainer.callbacks import Evaluate, LogMetrics, SaveCheckpoints, TellStatus
from dmoe.trainer.config import Config
from dmoe.trainer.nonfinite import NonFiniteError
from dmoe.trainer.summary import measure, summarise

# What can go wrong without a mistake in the program; anything else deserves its traceback.
FAILURES = (CheckpointError, NonFiniteError, FloatingPointError, OSError, UnicodeError)


def train(config: Config) -> None:
    """Train a run to its end, from its start or from its last checkpoint."""
    with process_group() as device, open_run(config, device) as run:
        callbacks = [
            TellStatus(run.journal),
            LogMetrics(config, run.journal, device=device, world_size=run.dims.world_size),
            Evaluate(config, run.journal, lambda max_batches: measure(run, max_batches)),
            SaveCheckpoints(),
        ]
        run.trainer.fit(callbacks)
        summarise(run)


def exit_status(action: Callable[[], int]) -> int:
    """Run a command and return its exit status, or that of its failure, told in one line."""
    try:
        return action()
    except ConfigError as error:
        message, status = f"error: {error}", 2
    except FAILURES as error:
        message, status = f"failed: {error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    if is_first_process():
        print(message, file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2

    def run() -> int:
        train(load_config(arguments[0], arguments[1:]))
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
