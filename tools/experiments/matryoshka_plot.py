"""The plot of the Matryoshka experiment: loss against k, a row of two panels for each text.

Called by `matryoshka_report.py`.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matryoshka_arms import ARMS, REFERENCE, SWEEP
from matryoshka_results import Text

SPECIALISTS = ("k1", "k1_plain", "k2", "k4", "k6")


def write_plot(texts: Sequence[Text], path: Path) -> None:
    """Write an SVG: lines are means over seeds, bands reach from the least to the most."""
    figure = Figure(figsize=(11, 4.2 * len(texts)), layout="constrained")
    FigureCanvasSVG(figure)
    for text, (left, right) in zip(
        texts, figure.subplots(len(texts), 2, squeeze=False), strict=True
    ):
        _losses(left, text)
        _above_reference(right, text)
        for panel in (left, right):
            panel.set_title(text.about["title"], fontsize=9)
            panel.set_xlabel("experts a token, k")
            panel.set_xticks(SWEEP)
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(fontsize=7)
    # Equal results make an equal file.
    with rc_context({"svg.hashsalt": "matryoshka"}):
        figure.savefig(path, metadata={"Date": None})


def _losses(panel: Axes, text: Text) -> None:
    """Draw the specialists and the layer-wise model."""
    panel.set_ylabel("held-out loss, nats a byte")
    for arm in text.arms("tokens"):
        if arm in (*SPECIALISTS, REFERENCE):
            _line(panel, arm, text.seeds(arm), lambda k, s, arm=arm: text.loss(arm, k, s))


def _above_reference(panel: Axes, text: Text) -> None:
    """Draw the arms that vary k, less the layer-wise model of the same seed."""
    panel.set_ylabel("loss above the layer-wise model's")
    for arm in text.arms("tokens"):
        seeds = [seed for seed in text.seeds(arm) if seed in text.seeds(REFERENCE)]
        if seeds and arm not in SPECIALISTS:
            _line(panel, arm, seeds, lambda k, s, arm=arm: _above(text, arm, k, s))


def _above(text: Text, arm: str, k: int, seed: int) -> float:
    return text.loss(arm, k, seed) - text.loss(REFERENCE, k, seed)


def _line(panel: Axes, arm: str, seeds: Sequence[int], value: Callable[[int, int], float]) -> None:
    columns = [[value(k, seed) for seed in seeds] for k in SWEEP]
    style = "--" if arm in SPECIALISTS else "-"
    means = [statistics.fmean(column) for column in columns]
    [line] = panel.plot(SWEEP, means, style, marker="o", markersize=3, label=ARMS[arm].title)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    panel.fill_between(SWEEP, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
