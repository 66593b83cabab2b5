"""Writes docs/results/matryoshka.md and its plot from the numbers of all texts and of `speed`.

Every number and every verdict on the page is computed from the JSON files. Called by
`matryoshka.py`.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiment_page import mean_and_spread, table
from matryoshka_arms import ARMS, K_MAX, SWEEP, TRAINED_K, Match
from matryoshka_claims import judge
from matryoshka_plot import write_plot
from matryoshka_results import Text

PAGE = Path(__file__).parents[2] / "docs" / "results" / "matryoshka.md"
MOST_OVERHEAD = 0.03
"""By how much a training step with elastic k may be slower than one with a fixed k."""
_PASSES = {
    "prefill": "Reading 1,024 tokens",
    "decode 1": "Writing one sequence",
    "decode 8": "Writing 8 sequences",
}

Json = dict[str, Any]


def write_report(out: Path, page: Path = PAGE) -> str:
    """Write the page, and the plot beside it, and return what was written.

    Args:
        out: output folder of the experiment.
        page: the Markdown file; the plot has its name and the ending .svg.
    """
    texts = [Text(path.parent) for path in sorted(out.glob("*/text.json"))]
    texts = [text for text in texts if text.runs]
    parts = ["# Matryoshka MoE: one model for every number of experts", _INTRO]
    if texts:
        write_plot(texts, page.with_suffix(".svg"))
        parts.append(f"![Loss against k]({page.with_suffix('.svg').name})")
    for text in texts:
        parts += _text(text)
    speed = out / "speed.json"
    if speed.exists():
        parts += _speed(json.loads(speed.read_text()))
    page.write_text("\n\n".join(parts) + "\n")
    return f"{page}: {len(texts)} texts, " + ("with speed" if speed.exists() else "without speed")


_INTRO = f"""Written by `python tools/experiments/matryoshka.py report`; do not edit by hand.

Matryoshka MoE (arXiv 2509.26520) trains with a number k of experts a token that varies from 1 to
{K_MAX}, so that one model runs at any k. Here it is compared with specialists trained at one k, on
a model of bytes small enough for two CPU cores: `tools/experiments/matryoshka.yaml`. Losses are
nats a byte of held-out text, mean ± standard deviation over seeds; a seed changes the initial
weights and the order of the text alike in all arms. Gates are divided by their sum, as in the
paper, but for the arm with a plain softmax gate. k = 7 and 8 were trained by nobody.

The gap of an arm at k is its loss there above that of the specialist of that k, of the same seed.
At k = 1 there are two specialists, and the better one counts: a gate divided by its sum is 1
whatever the router says, so the router of the first learns from the balance loss alone, and that of
the second from the language model too. A Matryoshka router has no such gradient either where it
draws 1, but has it wherever it draws more.

Second tables give all arms the training FLOPs of the layer-wise one, which has k = 3.5 on average;
arms that have the same FLOPs at equal tokens stand there with the same runs. The paper trains its
top-p baseline with p = 0.1, which is nearly k = 1; here a controller moves p to a mean k of 3.5,
and it is measured at forced k like all others.

Profiles are searched as by `dmoe eval --budget`, on training text, and measured on held-out text; a
profile that was found may spend less than the sum. Front-loaded ones share the sum out over the
layers in proportion to L, L - 1, ..., 1, back-loaded ones the reverse."""


def _text(text: Text) -> list[str]:
    about, run = text.about, next(iter(text.runs.values()))
    plan, model, train = run["plan"], run["config"]["model"], run["config"]["train"]
    steps = next(r["plan"]["steps"] for (_, kind, _), r in text.runs.items() if kind == "tokens")
    micro_batches = train["global_batch_size"] // train["micro_batch_size"]
    parts = [
        f"## {about['title']}",
        f"{about['train_tokens']:,} tokens of training text and {about['held_out_tokens']:,} held "
        f"out, of which the first {plan['eval_tokens']:,} at most are measured; byte bigrams reach "
        f"{about['bigram_loss']:.4f} on all of them. {model['num_layers']} layers of "
        f"{model['moe']['num_experts']} experts of width {model['moe']['expert_ffn_dim']}, D = "
        f"{model['dim']}. At equal tokens {steps} steps of {train['global_batch_size']} sequences "
        f"of {train['seq_len']} tokens, in {micro_batches} micro-batches. {run['machine']}; "
        f"{run['date']}.",
        "### What shows",
        table(
            ["claim", "verdict", "what was compared, nats a byte"],
            [[claim.words, claim.verdict, claim.numbers] for claim in judge(text)],
        ),
    ]
    titles: dict[Match, str] = {"tokens": "Equal tokens", "flops": "Equal training FLOPs"}
    for match, title in titles.items():
        if text.arms(match):
            parts += [f"### {title}: loss at each k", _losses(text, match)]
            if text.compared_seeds(match):
                parts += [f"### {title}: gap to the specialists", _gaps(text, match)]
    if any(text.searches()):
        parts += ["### Profiles of the layer-wise model at equal sums", _profiles(text)]
    return [*parts, "### Routers and experts", _routers(text)]


def _losses(text: Text, match: Match) -> str:
    rows = []
    for arm in text.arms(match):
        seeds = text.seeds(arm, match)
        steps = text.runs[arm, match, seeds[0]]["plan"]["steps"]
        cells = [mean_and_spread([text.loss(arm, k, s, match) for s in seeds]) for k in SWEEP]
        mean = mean_and_spread([text.mean_loss(arm, s, match) for s in seeds])
        rows.append([ARMS[arm].title, f"{len(seeds)}", f"{steps}", *cells, mean])
    trained = ", ".join(map(str, TRAINED_K))
    return table(
        ["arm", "seeds", "steps", *(f"k = {k}" for k in SWEEP), f"mean of {trained}"], rows
    )


def _gaps(text: Text, match: Match) -> str:
    rows = []
    for arm in text.arms(match):
        seeds = sorted(set(text.seeds(arm, match)) & set(text.compared_seeds(match)))
        if not seeds:
            continue
        cells = [mean_and_spread([text.gap(arm, k, s, match) for s in seeds]) for k in TRAINED_K]
        worst = [text.worst_gap(arm, s, match) for s in seeds]
        each = ", ".join(f"{gap:.4f}" for gap in worst)
        rows.append([ARMS[arm].title, *cells, mean_and_spread(worst), each])
    return table(
        ["arm", *(f"k = {k}" for k in TRAINED_K), "worst", "worst of each seed"],
        rows,
    )


def _profiles(text: Text) -> str:
    rows = []
    kinds = ("found", "uniform", "front", "back")
    searches = list(text.searches())
    for total in sorted({row["sum"] for _, row in searches}):
        of_sum = [(seed, row) for seed, row in searches if row["sum"] == total]
        cells = []
        for kind in kinds:
            losses = [row["loss"][kind] for _, row in of_sum if kind in row["loss"]]
            cells.append(mean_and_spread(losses) if losses else "")
        found = "; ".join(_profile(row["profiles"]["found"]) for _, row in of_sum)
        front = _profile(of_sum[0][1]["profiles"]["front"])
        rows.append([f"{total}", *cells, front, found])
    return table(
        [
            "sum of k",
            "found",
            "uniform",
            "front-loaded",
            "back-loaded",
            "front",
            "found, each seed",
        ],
        rows,
    )


def _routers(text: Text) -> str:
    """Return k in training, the agreement of rankings, the similarity of experts, own losses."""
    rows = []
    for arm in text.arms("tokens"):
        runs = [text.runs[arm, "tokens", seed] for seed in text.seeds(arm)]
        own = [run["own_loss"] for run in runs if "own_loss" in run]
        rows.append(
            [
                ARMS[arm].title,
                f"{statistics.fmean(run['k_mean_in_training'] for run in runs):.2f}",
                # The first layer reads the same at every k, and so agrees with itself.
                mean_and_spread([statistics.fmean(run["agreement_L"][1:]) for run in runs]),
                mean_and_spread([statistics.fmean(run["similarity_L"]) for run in runs]),
                mean_and_spread(own) if own else "",
            ]
        )
    return (
        "k in training is the mean of the steps that were logged. Agreement: rank correlation of "
        "router logits between k = 1 and 6, mean over the layers after the first. Similarity: mean "
        "cosine between the outputs of two experts.\n\n"
    ) + table(["arm", "k in training", "agreement", "similarity", "loss with its own choice"], rows)


def _speed(speed: Json) -> list[str]:
    model, moe = speed["model"], speed["model"]["moe"]
    rows: list[list[str]] = []
    told: list[str] = []
    for timed in speed["passes"]:
        medians = {k: statistics.median(timed["ms"][str(k)]) for k in SWEEP}
        flops = {k: timed["flops"][str(k)] for k in SWEEP}
        rows += [
            [
                _PASSES[timed["name"]],
                f"{k}",
                f"{medians[k]:.2f}",
                f"{1e3 * timed['tokens'] / medians[k]:.0f}",
                f"{medians[k] / medians[1]:.2f}",
                f"{flops[k] / flops[1]:.2f}",
            ]
            for k in SWEEP
        ]
        told.append(_proportion(_PASSES[timed["name"]], medians, flops))
    steps = []
    for k, times in speed["step_ms"].items():
        ratios = [e / f for e, f in zip(times["elastic"], times["fixed"], strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        steps.append(
            [
                k,
                *(f"{statistics.median(times[name]):.1f}" for name in ("fixed", "elastic")),
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                "yes" if middle <= 1 + MOST_OVERHEAD else "NO",
            ]
        )
    return [
        "## Speed",
        f"Inference: D = {model['dim']}, {model['num_layers']} layers of {moe['num_experts']} "
        f"experts of width {moe['expert_ffn_dim']}, initial weights, float32. "
        f"{speed['settings']}; {speed['machine']}; {speed['date']}.",
        "\n".join(told),
        "A step of writing reads the weights of all experts that any of its tokens uses. With 8 "
        f"tokens and balanced choices that is {_experts_read(moe['num_experts'], 1, 8):.1f} of the "
        f"{moe['num_experts']} experts at k = 1 and {_experts_read(moe['num_experts'], 8, 8):.1f} "
        "at k = 8, so the time of such steps cannot follow k.",
        table(["pass", "k", "ms", "tokens/s", "time over k = 1", "FLOPs over k = 1"], rows),
        "A training step of the experiment's model: a fixed k in all layers, and a k drawn for "
        "each layer with the same sum in every micro-batch (`budget`). Medians over rounds of both "
        "in turn; the ratio is the median of the rounds' own, with its quartiles.",
        table(
            [
                "mean k",
                "fixed, ms",
                "elastic, ms",
                "elastic / fixed",
                "quartiles",
                f"within {MOST_OVERHEAD:.0%}",
            ],
            steps,
        ),
    ]


def _proportion(title: str, medians: dict[int, float], flops: dict[int, float]) -> str:
    """Say how much of the time follows k: a straight line through the medians, a + b k."""
    first, last = SWEEP[0], SWEEP[-1]
    b, a = np.polyfit(SWEEP, [medians[k] for k in SWEEP], 1)
    slope = (flops[last] - flops[first]) / (last - first)
    faster = "faster" if medians[first] < medians[last] else "NOT faster"
    of_time = [f"{b * k / (a + b * k):.0%}" for k in (last, first)]
    of_flops = [f"{slope * k / flops[k]:.0%}" for k in (last, first)]
    return (
        f"- {title}: k = {first} is {faster} than k = {last}, by a factor of "
        f"{medians[last] / medians[first]:.2f}; by FLOPs it would be "
        f"{flops[last] / flops[first]:.2f}, and in proportion to k {last / first:.2f}. By least "
        f"squares the time is {a:.2f} ms + {b:.2f} ms x k, so that {of_time[0]} of it follows k at "
        f"k = {last}, and {of_time[1]} at k = {first}; of the FLOPs {of_flops[0]} and "
        f"{of_flops[1]}."
    )


def _experts_read(num_experts: int, k: int, num_tokens: int) -> float:
    """Return how many experts of a layer a step uses, where each token takes any k alike."""
    return num_experts * (1 - (1 - k / num_experts) ** num_tokens)


def _profile(k_L: Sequence[int]) -> str:
    return "-".join(map(str, k_L))
