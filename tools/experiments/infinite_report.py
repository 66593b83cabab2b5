"""Writes docs/results/infinite.md and its plot from the numbers of all texts and of `speed`.

Every number and every verdict on the page is computed from the JSON files. Called by
`infinite.py`.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment_page import claims_table, mean_and_spread, table
from infinite_arms import ARMS, SWEEP_ARMS, TRAINED_SAMPLES, Group
from infinite_claims import of_ours, of_paper
from infinite_plot import write_plot
from infinite_results import Text

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from harness import ratio

PAGE = Path(__file__).parents[2] / "docs" / "results" / "infinite.md"
REFERENCE = "neuron"
"""The arm that the others are compared with."""
STEPS = (0.025, 0.125, 0.25, 0.5, 1.0)
"""Where on the way of the training its statistics are shown."""

Json = dict[str, Any]


def write_report(out: Path, page: Path = PAGE) -> str:
    """Write the page, and the plot beside it, and return what was written.

    Args:
        out: output folder of the experiment.
        page: the Markdown file; the plot has its name and the ending .svg.
    """
    texts = [Text(path.parent) for path in sorted(out.glob("*/text.json"))]
    texts = [text for text in texts if text.runs]
    parts = ["# Infinity-MoE: a continuous space of experts", _INTRO]
    if texts:
        write_plot(texts, page.with_suffix(".svg"))
        parts.append(f"![Losses and entropies]({page.with_suffix('.svg').name})")
    for text in texts:
        parts += _text(text)
    speed = out / "speed.json"
    if speed.exists():
        parts += _speed(json.loads(speed.read_text()))
    page.write_text("\n\n".join(parts) + "\n")
    return f"{page}: {len(texts)} texts, " + ("with speed" if speed.exists() else "without speed")


_INTRO = f"""Written by `python tools/experiments/infinite.py report`; do not edit by hand.

Infinity-MoE (arXiv 2601.17680) draws {TRAINED_SAMPLES} points of a latent space for each token, and
each switches on a quarter of the neurons of one wide network. Here it is compared with dense
networks, Switch and top-2 of 4 experts, on a model of bytes small enough for two CPU cores:
`tools/experiments/infinite.yaml`, of the Llama family with another feed-forward part, gated, in
each arm. All arms but the narrow dense one have the same number of parameters, the router and the
space of the neuron arm included, and the sparse ones and the narrow dense one about the same number
of active ones. The arms of the d_z sweep differ in W_z and the router, which grow with d_z.

Losses are nats a byte of held-out text, mean ± standard deviation over seeds; a seed changes the
initial weights and the order of the text alike in all arms, so differences are taken within seeds.
Arms with one seed have no spread, and a difference as small as that of other arms says nothing.
The paper trains GPT-2 small and medium on 10B tokens and reports zero-shot accuracies; what a claim
of it becomes here is a loss."""


def _text(text: Text) -> list[str]:
    about, run = text.about, next(iter(text.runs.values()))
    plan, model, train = run["plan"], run["config"]["model"], run["config"]["train"]
    return [
        f"## {about['title']}",
        f"{about['train_tokens']:,} tokens of training text and {about['held_out_tokens']:,} held "
        f"out; byte bigrams reach {about['bigram_loss']:.4f}. {model['num_layers']} layers, D = "
        f"{model['dim']}; {plan['steps']} steps of {train['global_batch_size']} sequences of "
        f"{train['seq_len']} tokens, {run['tokens']:,} tokens in all, with every arm. "
        f"{run['machine']}; {run['date']}.",
        "### Which claims of the paper show",
        claims_table(of_paper(text)),
        "### What is ours",
        claims_table(of_ours(text)),
        "### Equal parameters, equal tokens",
        _losses(text, "compared"),
        "### Samples and experts at inference",
        f"Of the first {plan['eval_tokens']:,} held-out tokens. Active is the share of a layer's "
        "neurons, blocks or experts that a token uses, overlap the share of a sample's mask that "
        "another one has, too.",
        _sweep(text),
        "### Width of the latent space",
        _latent_dims(text),
        "### The router",
        _losses(text, "router"),
        "### Several masked layers",
        "Two layers of 296 neurons (288 with a router each), half of them active in each, so that "
        "a quarter is left.",
        _losses(text, "deep"),
        "### Use of neurons in training",
        "Mean over the layers, of the tokens of one step; mean over seeds. Entropy is that of the "
        "selection distribution over its maximum, dead the share of neurons, blocks or experts "
        "that no token of the step uses.",
        _usage(text),
    ]


def _losses(text: Text, group: Group) -> str:
    rows = []
    arms = text.arms(group)
    for arm in [REFERENCE, *arms] if REFERENCE not in arms and text.seeds(REFERENCE) else arms:
        seeds = text.seeds(arm)
        run = text.runs[arm, seeds[0]]
        paired = [seed for seed in seeds if seed in text.seeds(REFERENCE)]
        above = [text.loss(arm, seed) - text.loss(REFERENCE, seed) for seed in paired]
        rows.append(
            [
                ARMS[arm].title,
                f"{run['num_params'] / 1e6:.3f}M",
                f"{run['num_active_params'] / 1e6:.3f}M",
                f"{len(seeds)}",
                mean_and_spread([text.loss(arm, seed) for seed in seeds]),
                mean_and_spread(above) if above and arm != REFERENCE else "",
            ]
        )
    return table(["arm", "parameters", "active", "seeds", "loss", "above neuron's"], rows)


def _sweep(text: Text) -> str:
    rows = []
    for arm in text.arms("compared"):
        seeds = text.seeds(arm)
        for number in text.numbers(arm):

            def mean(name: str, arm: str = arm, number: str = number) -> str:
                try:
                    values = [text.usage(arm, number, name, seed) for seed in text.seeds(arm)]
                except KeyError:
                    return ""
                return f"{statistics.fmean(values):.3f}"

            rows.append(
                [
                    ARMS[arm].title,
                    number,
                    mean_and_spread([text.at(arm, number, seed) for seed in seeds]),
                    mean("active"),
                    mean("overlap"),
                    mean("load_entropy"),
                ]
            )
    return table(["arm", "samples or experts", "loss", "active", "overlap", "entropy"], rows)


def _latent_dims(text: Text) -> str:
    rows = []
    for dim, arm in SWEEP_ARMS.items():
        seeds = text.seeds(arm)
        if seeds:
            losses = [text.loss(arm, seed) for seed in seeds]
            params = text.runs[arm, seeds[0]]["num_params"]
            each = ", ".join(f"{seed}: {text.loss(arm, seed):.4f}" for seed in seeds)
            rows.append([f"{dim}", f"{params / 1e6:.3f}M", mean_and_spread(losses), each])
    return table(["d_z", "parameters", "loss", "of each seed"], rows)


def _usage(text: Text) -> str:
    rows = []
    for arm in (*text.arms("compared"), *text.arms("router")):
        curves = [text.curve(arm, "load_entropy", seed) for seed in text.seeds(arm)]
        if not any(curves):
            continue  # dense
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        for step in (_nearest(steps, share) for share in STEPS):
            cells = []
            for name in ("load_entropy", "dead_frac", "active", "overlap", "sigma", "sigma_std"):
                values = [
                    statistics.fmean(of_seed[step])
                    for seed in text.seeds(arm)
                    if (of_seed := text.curve(arm, name, seed))
                ]
                cells.append(f"{statistics.fmean(values):.3f}" if values else "")
            rows.append([ARMS[arm].title, f"{step}", *cells])
    return table(
        ["arm", "step", "entropy", "dead", "active", "overlap", "sigma", "spread of sigma"], rows
    )


def _nearest(steps: Sequence[int], share: float) -> int:
    """Return the step that is nearest to a share of the last."""
    return min(steps, key=lambda step: abs(step - share * steps[-1]))


def _speed(speed: Json) -> list[str]:
    rows = []
    for arm, times in speed["ms"].items():
        median = statistics.median(times)
        rows.append(
            [
                ARMS[arm].title,
                f"{median:.0f}",
                f"{1e3 * speed['tokens'] / median:,.0f}",
                f"{ratio(times, speed['ms']['top2']):.2f}",
            ]
        )
    return [
        "## Speed",
        f"Training steps of {speed['tokens']:,} tokens, all arms in turn; the ratio is the median "
        f"of the rounds' own. {speed['settings']}; {speed['machine']}; {speed['date']}.",
        table(["arm", "ms", "tokens/s", "time over top-2 of 4"], rows),
        "The layers alone are in [cpu_intel_xeon.md](cpu_intel_xeon.md): all samples at once "
        "against a network for each, blocks against neurons and top-k, and latency against the "
        "active fraction.",
    ]
