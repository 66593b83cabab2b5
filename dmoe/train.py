"""Train a model: `torchrun --nproc-per-node N -m dmoe.train CONFIG [a.b=c ...]`.

In one process: `python -m dmoe.train CONFIG` or `dmoe train CONFIG`. The same command continues an
interrupted run. Exit status: 0 good, 1 failed, 2 bad input.
"""

import sys
from collections.abc import Sequence

from dmoe.config import ConfigError, load_config
from dmoe.data import PackedDataset, bigram_baseline
from dmoe.evaluation import EvalResult, evaluate_split
from dmoe.generation import SamplingConfig, generate
from dmoe.parallel import is_first_process, process_group
from dmoe.trainer.build import Run, open_run
from dmoe.trainer.callbacks import Evaluate, LogMetrics, SaveCheckpoints, TellStatus
from dmoe.trainer.config import Config


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


def measure(run: Run, max_batches: int | None = None) -> EvalResult:
    """Evaluate the held-out split, or its first micro-batches; every rank takes its share."""
    return evaluate_split(
        run.trainer.engine.model,
        run.valid,
        seq_len=run.config.train.seq_len,
        micro_batch_size=run.config.train.micro_batch_size,
        mask_documents=run.config.data.mask_documents,
        dims=run.dims,
        max_batches=max_batches,
    )


def summarise(run: Run) -> None:
    """Say what came out: held-out loss, a baseline, a sample, and where everything is."""
    config, say = run.config, run.journal.message
    loss = run.trainer.progress.eval_loss
    if loss is None:  # a run that was cut to fewer steps than it had made
        loss = measure(run).loss
    bits = run.valid.bits_per_byte(loss)
    say(f"held-out loss: {loss:.4f} nats a token" + (f" = {bits:.4f} bits a byte" if bits else ""))
    if config.data.tokenizer == "bytes" and isinstance(run.dataset, PackedDataset):
        bigrams = bigram_baseline(
            run.dataset.split,
            run.valid,
            vocab_size=run.tokenizer.vocab_size,
            mask_documents=config.data.mask_documents,
        )
        say(f"byte bigrams on the same text: {bigrams.bits_per_byte:.4f} bits a byte")
    if config.eval.sample_tokens:
        sampling = SamplingConfig(max_new_tokens=config.eval.sample_tokens, temperature=0.8)
        model, group = run.trainer.engine.model, run.dims.world_group
        prompt = config.eval.prompt
        [sample] = generate(model, run.tokenizer, [prompt], sampling, group=group)
        say(f"sample:\n{prompt}{sample.text}")
    run.journal.results({"eval/loss": loss})
    say(f"run folder: {config.run.folder}")
    if config.metrics.tensorboard:
        say(f"curves: tensorboard --host localhost --logdir {config.run.folder / 'tensorboard'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        train(load_config(arguments[0], arguments[1:]))
    except ConfigError as error:
        if is_first_process():
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
