"""What a run measures on held-out text, and what it says at its end."""

from dmoe.data import PackedDataset, bigram_baseline
from dmoe.evaluation import EvalResult, evaluate_split
from dmoe.generation import SamplingConfig, generate
from dmoe.trainer.build import Run


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
    result = measure(run)
    text = f"held-out loss: {result.loss:.4f} nats a token"
    if result.bits_per_byte is not None:
        text += f" = {result.bits_per_byte:.4f} bits a byte"
    run.journal.results({"eval/final_loss": result.loss})
    step, bits = run.trainer.progress.step, result.bits_per_byte
    run.journal.status("finished", step, eval_loss=result.loss, eval_bits_per_byte=bits)
    say(text)
    if config.data.tokenizer == "bytes" and isinstance(run.dataset, PackedDataset):
        _tell_baseline(run, run.dataset)
    if config.eval.sample_tokens:
        _tell_sample(run)
    say(f"run folder: {config.run.folder}")
    if config.metrics.tensorboard:
        say(f"curves: tensorboard --host localhost --logdir {config.run.folder / 'tensorboard'}")


def _tell_baseline(run: Run, dataset: PackedDataset) -> None:
    """Say what byte bigrams of the training text reach on the same held-out text."""
    if run.dims.rank != 0:
        return
    bigrams = bigram_baseline(
        dataset.split,
        run.valid,
        vocab_size=run.tokenizer.vocab_size,
        mask_documents=run.config.data.mask_documents,
    )
    run.journal.message(f"byte bigrams on the same text: {bigrams.bits_per_byte:.4f} bits a byte")


def _tell_sample(run: Run) -> None:
    """Continue the prompt with the model, in which every rank takes part."""
    prompt, model = run.config.eval.prompt, run.trainer.engine.model
    room = run.config.model.max_seq_len - len(run.tokenizer.encode(prompt))
    if room <= 0:
        run.journal.message("no sample: eval.prompt leaves no room within model.max_seq_len")
        return
    num_tokens = min(run.config.eval.sample_tokens, room)
    sampling = SamplingConfig(max_new_tokens=num_tokens, temperature=0.8)
    [sample] = generate(model, run.tokenizer, [prompt], sampling, group=run.dims.world_group)
    run.journal.message(f"sample:\n{prompt}{sample.text}")
