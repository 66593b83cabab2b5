"""The plot of the infinity-MoE experiment: four panels for each text.

Called by `infinite_report.py`.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from infinite_arms import ARMS, SWEEP_ARMS
from infinite_results import Text
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def write_plot(texts: Sequence[Text], path: Path) -> None:
    """Write an SVG: lines are means over seeds, bands reach from the least to the most."""
    figure = Figure(figsize=(12, 8 * len(texts)), layout="constrained")
    FigureCanvasSVG(figure)
    rows = figure.subplots(2 * len(texts), 2, squeeze=False)
    for index, text in enumerate(texts):
        panels = [*rows[2 * index], *rows[2 * index + 1]]
        for draw, panel in zip((_sweep, _entropy, _latent_dims, _losses), panels, strict=True):
            draw(panel, text)
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=7)
        panels[0].set_title(text.about["title"], fontsize=9)
    # Equal results make an equal file.
    with rc_context({"svg.hashsalt": "infinite"}):
        figure.savefig(path, metadata={"Date": None})


def _sweep(panel: Axes, text: Text) -> None:
    """Draw the loss against the number of samples or experts at inference."""
    panel.set_xlabel("samples, or experts, at inference")
    panel.set_ylabel("held-out loss, nats a byte")
    panel.set_xscale("log", base=2)
    for arm in text.arms("compared"):
        numbers = [int(number) for number in text.numbers(arm) if number != "mean"]
        if len(numbers) > 1:
            _line(panel, text, arm, numbers, lambda k, seed, arm=arm: text.at(arm, k, seed))
    panel.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])


def _entropy(panel: Axes, text: Text) -> None:
    """Draw the entropy of the selection in training, mean over layers."""
    panel.set_xlabel("training step")
    panel.set_ylabel("entropy of the selection over its maximum")
    for arm in ("neuron", "block", "top2", "switch"):
        curves = [text.curve(arm, "load_entropy", seed) for seed in text.seeds(arm)]
        if curves:
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            by_seed = dict(zip(text.seeds(arm), curves, strict=True))
            _line(
                panel,
                text,
                arm,
                steps,
                lambda step, seed, by_seed=by_seed: statistics.fmean(by_seed[seed][step]),
                marker="",
            )


def _latent_dims(panel: Axes, text: Text) -> None:
    """Draw the loss against the width of the latent space."""
    panel.set_xlabel("d_z")
    panel.set_ylabel("held-out loss, nats a byte")
    panel.set_xscale("log", base=2)
    dims = [dim for dim, arm in SWEEP_ARMS.items() if text.seeds(arm)]
    if not dims:
        return
    seeds = set.intersection(*(set(text.seeds(SWEEP_ARMS[dim])) for dim in dims))
    for seed in sorted(seeds):
        losses = [text.loss(SWEEP_ARMS[dim], seed) for dim in dims]
        panel.plot(dims, losses, marker="o", markersize=3, label=f"seed {seed}")
    panel.set_xticks(dims, [str(dim) for dim in dims])


def _losses(panel: Axes, text: Text) -> None:
    """Draw the loss of every arm, a dot for each seed."""
    panel.set_xlabel("held-out loss, nats a byte")
    arms = [arm for group in ("compared", "router", "deep") for arm in text.arms(group)]
    for place, arm in enumerate(reversed(arms)):
        losses = [text.loss(arm, seed) for seed in text.seeds(arm)]
        panel.plot(losses, [place] * len(losses), "o", markersize=4, color="tab:blue", alpha=0.7)
    panel.set_yticks(range(len(arms)), [ARMS[arm].title for arm in reversed(arms)], fontsize=7)


def _line(
    panel: Axes,
    text: Text,
    arm: str,
    places: Sequence[int],
    value: Callable[[int, int], float],
    marker: str = "o",
) -> None:
    columns = [[value(place, seed) for seed in text.seeds(arm)] for place in places]
    means = [statistics.fmean(column) for column in columns]
    [line] = panel.plot(places, means, marker=marker, markersize=3, label=ARMS[arm].title)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    panel.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
